"""The device of a Lightning trainer."""

from __future__ import annotations

from typing import Any

import torch


def trainer_device(device: torch.device) -> dict[str, Any]:
    """The arguments of `lightning.Trainer` by which one process computes on `device`, and not on the first of its kind.

    Lightning counts CUDA devices as torch does: `devices=[1]` is cuda:1, `devices=1` is any one, which is cuda:0.
    """
    if device.type != "cuda":
        return {"accelerator": device.type, "devices": 1}
    return {"accelerator": "gpu", "devices": 1 if device.index is None else [device.index]}
