"""Loggers: where the metrics of the way go while a stage runs."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def logging_to(
    kind: str, folder: Path, config: dict[str, Any], job_type: str, group: str | None = None
) -> Iterator[Any]:
    """`make_logger`'s logger, closed at the end, so that the next stage of one process has a run of its own."""
    logger = make_logger(kind, folder, config, job_type, group)
    try:
        yield logger
    finally:
        if logger:
            logger.finalize("success" if sys.exc_info()[0] is None else "failed")
        if kind == "wandb":
            logger.experiment.finish()


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

        # Of an interrupted run; one that is resumed logs only what follows.
        shutil.rmtree(folder / "logs", ignore_errors=True)
        return CSVLogger(save_dir=folder, name="", version="logs")
    if kind == "wandb":
        return _wandb(folder, config, job_type, group)
    raise ValueError(f"tracking is {kind!r}, must be csv, wandb or none")


def _wandb(folder: Path, config: dict[str, Any], job_type: str, group: str | None) -> Any:
    from lightning.pytorch.loggers import WandbLogger

    online = _may_go_online()
    return WandbLogger(
        project=os.environ.get("WANDB_PROJECT", "ftp-lightning"),
        save_dir=folder,
        offline=not online,
        mode="online" if online else "offline",  # said outright: wandb has read WANDB_MODE before Lightning sets it
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
