"""Loggers: where the metrics of the way go while a stage runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def make_logger(kind: str, folder: Path, config: dict[str, Any], job_type: str, group: str | None = None) -> Any:
    """A Lightning logger that writes under `folder`, or False for `none`, as `lightning.Trainer(logger=...)` takes it.

    `csv`: folder/logs/metrics.csv. `wandb`: online where wandb finds a key that the user has configured, unless
    WANDB_MODE says otherwise; else offline, under folder/wandb. A key is never asked for and never written.
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

    return WandbLogger(
        project=os.environ.get("WANDB_PROJECT", "ftp-lightning"),
        save_dir=folder,
        offline=not _may_go_online(),
        config=config,
        job_type=job_type,
        group=group,
        name=job_type,
    )


def _may_go_online() -> bool:
    import wandb

    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    return wandb.login(prompt=False, verify=False)
