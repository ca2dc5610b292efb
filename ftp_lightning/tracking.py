"""Loggers: where the metrics of the way go while a stage runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def make_logger(kind: str, folder: Path, config: dict[str, Any], job_type: str, group: str | None = None) -> Any:
    """A Lightning logger that writes under `folder`, or False for `none`, as `lightning.Trainer(logger=…)` takes it.

    `csv`: folder/logs/metrics.csv. `wandb`: online where a key is configured already (WANDB_API_KEY, or a login that wandb finds
    itself with WANDB_MODE=online), else offline under folder/wandb; this function never asks for a key and never writes one.
    ValueError for another kind.
    """
    if kind == "none":
        return False
    if kind == "csv":
        from lightning.pytorch.loggers import CSVLogger

        return CSVLogger(save_dir=folder, name="", version="logs")
    if kind == "wandb":
        return _wandb(folder, config, job_type, group)
    raise ValueError(f"tracking is {kind!r}, must be csv, wandb or none")


def _wandb(folder: Path, config: dict[str, Any], job_type: str, group: str | None) -> Any:
    from lightning.pytorch.loggers import WandbLogger

    online = bool(os.environ.get("WANDB_API_KEY")) or os.environ.get("WANDB_MODE") == "online"
    project = os.environ.get("WANDB_PROJECT", "ftp-lightning")
    return WandbLogger(
        project=project, save_dir=folder, offline=not online, config=config, job_type=job_type, group=group, name=job_type
    )
