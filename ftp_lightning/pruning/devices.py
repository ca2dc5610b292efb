"""Where a model computes, whose weights may lie on several devices or wait elsewhere (`device_map` of accelerate).

A *dispatched* model has hooks that bring the arguments of every block to the device it computes on, and weights that
wait on the CPU or on disk as well. A model without such hooks computes where its weights are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """accelerate's hooks on this module."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def hooked_place(module: nn.Module) -> torch.device | None:
    """The device that hooks bring this module's arguments to; None without such hooks."""
    places = (getattr(hook, "execution_device", None) for hook in hooks_of(module))
    place = next((place for place in places if place is not None), None)
    return None if place is None else torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def home(model: nn.Module) -> torch.device:
    """Where token ids go in: where the embedding of a dispatched model computes, else where the first weight is."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    place = None if embedding is None else hooked_place(embedding)
    return next(model.parameters()).device if place is None else place


def brought(args: tuple, kwargs: dict, place: torch.device) -> tuple[tuple, dict]:
    """The arguments of a block's call on `place`, as its hook would bring them; a cache stays where it is."""
    from accelerate.utils import send_to_device

    from ftp_lightning.pruning.family import CACHE_NAMES

    return send_to_device(args, place), send_to_device(kwargs, place, skip_keys=list(CACHE_NAMES))


def fetched(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """The numbers of a weight; of one that waits elsewhere, what its hook reads of it now. A model without numbers (on
    the meta device, no hooks) keeps its own."""
    if not weight.is_meta:
        return weight
    owner, _, leaf = name.rpartition(".")
    waiting = (getattr(hook, "weights_map", None) for hook in hooks_of(model.get_submodule(owner)))
    return next((weights[leaf] for weights in waiting if weights is not None), weight)
