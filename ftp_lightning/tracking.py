"""Loggers: where the metrics of the way go while a stage runs, and what it has found when it is done."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ftp_lightning.artifact import write_text
from ftp_lightning.errors import UserError
from ftp_lightning.fingerprint import digest

KINDS = ("csv", "tensorboard", "wandb", "none")
LOGS, RUN = "logs", "wandb-run.json"


@contextmanager
def logging_to(
    kind: str, folder: Path, config: dict[str, Any], job_type: str, group: str | None = None
) -> Iterator[Any]:
    """`make_logger`'s logger, closed at the end, so that the next stage of one process has a run of its own."""
    with _wandb_files_in(folder) if kind == "wandb" else nullcontext():
        logger = make_logger(kind, folder, config, job_type, group)
        try:
            yield logger
        finally:
            failed = sys.exc_info()[0] is not None
            if logger:
                logger.finalize("failed" if failed else "success")
            if kind == "wandb":
                logger.experiment.finish(exit_code=int(failed))


def make_logger(kind: str, folder: Path, config: dict[str, Any], job_type: str, group: str | None = None) -> Any:
    """A Lightning logger that writes under `folder`, or False for `none`, as `lightning.Trainer(logger=...)` takes it.

    `csv`: folder/logs/metrics.csv. `tensorboard`: folder/logs. `wandb`: online where wandb finds a key that the user
    has configured, unless WANDB_MODE says otherwise; else offline, under folder/wandb. A key is never asked for and
    never written. Runs are grouped by `group`, by default the folder that `folder` lies in: the chain's. A stage that
    goes on after an interruption goes on in its run, one of `wandb agent` in the run that the agent has named.
    ValueError for another kind.
    """
    if kind == "none":
        return False
    if kind in ("csv", "tensorboard"):
        # Of an interrupted run; one that is resumed logs only what follows.
        shutil.rmtree(folder / LOGS, ignore_errors=True)
        return _csv(folder) if kind == "csv" else _tensorboard(folder)
    if kind == "wandb":
        return _wandb(folder, config, job_type, group or folder.resolve().parent.name)
    raise ValueError(f"tracking is {kind!r}, must be one of {', '.join(KINDS)}")


def log_outcome(
    logger: Any,
    *,
    numbers: Mapping[str, float | None] | None = None,
    history: Iterable[Mapping[str, Any]] = (),
    images: Mapping[str, Callable[[], bytes]] | None = None,
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    pruned: Path | None = None,
) -> None:
    """What a stage has found, told to its logger as far as that can hold it; nothing without a logger.

    Args:
        numbers: at the end; what is None is left out.
        history: rows with "step", of a way that was not logged while it was gone.
        images: name -> what draws its PNG, drawn only where images can be kept (wandb, TensorBoard).
        tables: name -> rows, all with the same keys (wandb).
        pruned: folder of a pruner, kept as an artifact of type "pruner" (wandb).
    """
    if not logger:
        return
    last = None
    for row in history:
        last = row["step"]
        values = {f"train/{name}": value for name, value in row.items() if name != "step" and value is not None}
        logger.log_metrics(values, step=last)
    known = {name: value for name, value in (numbers or {}).items() if value is not None}
    if known:
        logger.log_metrics(known, step=None if last is None else last + 1)
    kind = type(logger).__name__
    for name, draw in (images or {}).items():
        if kind == "WandbLogger":
            logger.log_image(name, [_pixels(draw())])
        elif kind == "TensorBoardLogger":
            logger.experiment.add_image(name, _array(draw()), dataformats="HWC")
    if kind == "WandbLogger":
        _log_files(logger, tables or {}, pruned)


def _log_files(logger: Any, tables: Mapping[str, Sequence[Mapping[str, Any]]], pruned: Path | None) -> None:
    import wandb

    for name, rows in tables.items():
        if rows:
            logger.log_table(
                name, columns=list(rows[0]), data=[[_cell(value) for value in row.values()] for row in rows]
            )
    if pruned is not None:
        artifact = wandb.Artifact(f"pruned-{logger.experiment.id}", type="pruner")
        artifact.add_dir(str(pruned))
        logger.experiment.log_artifact(artifact)


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)


def _pixels(png: bytes) -> Any:
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    page = Image.new("RGBA", picture.size, "white")  # figures are drawn without a ground
    return Image.alpha_composite(page, picture).convert("RGB")


def _array(png: bytes) -> Any:
    import numpy

    return numpy.asarray(_pixels(png))


def _csv(folder: Path) -> Any:
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(save_dir=folder, name="", version=LOGS)


def _tensorboard(folder: Path) -> Any:
    from lightning.pytorch.loggers import TensorBoardLogger

    try:
        return TensorBoardLogger(save_dir=folder, name="", version=LOGS)
    except ModuleNotFoundError:
        raise UserError("tracking is tensorboard, which is not installed\nRun `pip install tensorboard`.") from None


def _wandb(folder: Path, config: dict[str, Any], job_type: str, group: str) -> Any:
    from lightning.pytorch.loggers import WandbLogger

    online = _may_go_online()
    return WandbLogger(
        project=os.environ.get("WANDB_PROJECT", "ftp-lightning"),
        save_dir=folder,
        offline=not online,
        mode="online" if online else "offline",  # said outright: wandb has read WANDB_MODE before Lightning sets it
        config=config,
        job_type=job_type,
        group=os.environ.get("WANDB_RUN_GROUP", group),
        name=job_type,
        id=os.environ.get("WANDB_RUN_ID") or _run_id(folder, config),
        resume="allow",
    )


def _run_id(folder: Path, config: dict[str, Any]) -> str:
    """The id of this folder's run: that of the interrupted one with these settings, else a new one.

    It lies among the logs, which go when a finished stage is run again.
    """
    file, settings = folder / LOGS / RUN, digest(json.dumps(config, sort_keys=True, default=str).encode())
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["settings"] == settings:
            return known["id"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    fresh = uuid.uuid4().hex[:8]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({"id": fresh, "settings": settings}) + "\n")
    return fresh


@contextmanager
def _wandb_files_in(folder: Path) -> Iterator[None]:
    """Artifacts wait for their upload under `folder`, too, unless the user has named a place."""
    names = [name for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR") if name not in os.environ]
    try:
        for name in names:
            os.environ[name] = str((folder / "wandb").resolve())
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def _may_go_online() -> bool:
    import wandb

    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    return wandb.login(prompt=False, verify=False)
