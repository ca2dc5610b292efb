"""Loggers: where the metrics of the way go while a stage runs, and what it has found when it is done."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ftp_lightning.errors import UserError, file_error
from ftp_lightning.fingerprint import digest
from ftp_lightning.whole_files import set_aside, write_text

KINDS = ("csv", "tensorboard", "wandb", "none")
LOGS, RUN = "logs", "run.json"


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
            if kind == "wandb" and logger:
                logger.experiment.finish(exit_code=int(failed))


def make_logger(kind: str, folder: Path, config: dict[str, Any], job_type: str, group: str | None = None) -> Any:
    """A Lightning logger that writes under `folder`, or False for `none`, as `lightning.Trainer(logger=...)` takes it.

    `csv`: folder/logs/metrics.csv. `tensorboard`: folder/logs. `wandb`: online where wandb finds a key that the user
    has configured, unless WANDB_MODE says otherwise; else offline, under folder/wandb; False if it says `disabled`. A
    key is never asked for and never written. Runs are grouped by `group`, by default the folder that `folder` lies in:
    the chain's. A stage that resumes with the same settings continues its log: what was logged from the resumed step on
    is replaced. A run of `wandb agent` is the one that the agent has named. ValueError for another kind.
    """
    if kind == "none" or (kind == "wandb" and os.environ.get("WANDB_MODE") == "disabled"):
        return False
    if kind not in KINDS:
        raise ValueError(f"tracking is {kind!r}, must be one of {', '.join(KINDS)}")
    run = _run_id(folder, config)
    if kind == "wandb":
        try:
            return _wandb(folder, config, job_type, group or folder.resolve().parent.name, run)
        except (OSError, RuntimeError, ValueError) as error:  # no home, the home of somebody else, an odd run id
            raise UserError(
                f"tracking is wandb, which cannot start: {' '.join(str(error).split())[:160]}\n"
                "Set HOME or WANDB_RUN_ID to what it can use, or give --tracking csv."
            ) from error
    return _csv(folder) if kind == "csv" else _tensorboard(folder)


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


def _before_the_first(logger: Any, begin: Callable[[int | None], None]) -> Any:
    """The logger, made to call `begin` with the step of the first metrics, before it logs them."""
    log_metrics = logger.log_metrics

    def first(metrics: dict[str, float], step: int | None = None) -> None:
        logger.log_metrics = log_metrics
        begin(step)
        log_metrics(metrics, step)

    logger.log_metrics = first
    return logger


def _csv(folder: Path) -> Any:
    from lightning.pytorch.loggers import CSVLogger

    file = folder / LOGS / "metrics.csv"
    former = _rows(file)  # read first: Lightning deletes the file
    logger = CSVLogger(save_dir=folder, name="", version=LOGS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of that deletion
        logger.experiment.metrics = list(former)

    def begin(step: int | None) -> None:
        file.unlink(missing_ok=True)
        logger.experiment.metrics = [row for row in former if step is None or row["step"] < step]

    return _before_the_first(logger, begin)


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.csv that may not be there, or end in the middle of a line; a broken one is set aside."""
    if not file.is_file():
        return []
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            found = [{name: value for name, value in row.items() if name and value} for row in csv.DictReader(lines)]
    except (UnicodeDecodeError, csv.Error):
        set_aside(file, "is broken")
        return []
    return [row | {"step": int(row["step"])} for row in found if str(row.get("step", "")).isdecimal()]


def _tensorboard(folder: Path) -> Any:
    from lightning.pytorch.loggers import TensorBoardLogger

    try:
        logger = TensorBoardLogger(save_dir=folder, name="", version=LOGS)
    except ModuleNotFoundError:
        raise UserError("tracking is tensorboard, which is not installed\nRun `pip install tensorboard`.") from None

    def begin(step: int | None) -> None:
        """Tell readers that a session starts at this step: they drop what an interrupted one logged from there on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

        if step is not None:
            started = Event(step=step, session_log=SessionLog(status=SessionLog.START))
            logger.experiment.file_writer.add_event(started)

    return _before_the_first(logger, begin)


def _wandb(folder: Path, config: dict[str, Any], job_type: str, group: str, run: str) -> Any:
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
        name=_run_name(config, job_type),
        id=os.environ.get("WANDB_RUN_ID") or run,
        resume="allow",
    )


def _run_name(config: dict[str, Any], job_type: str) -> str | None:
    """A run of a study is named by its label and seed, one that an agent started without a label by wandb."""
    if config.get("label"):
        return f"{config['label']}, seed {config.get('seed')}"
    return None if "WANDB_RUN_ID" in os.environ else job_type


def _run_id(folder: Path, config: dict[str, Any]) -> str:
    """The id of this folder's run: that of the interrupted one with these settings, else a new one without its logs.

    It lies among the logs, which go when a finished stage is run again.
    """
    file, settings = folder / LOGS / RUN, digest(json.dumps(config, sort_keys=True, default=str).encode())
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["settings"] == settings:
            return known["id"]
    except OSError as error:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):  # it is there, and the logs stay
            raise file_error(error) or error from None
    except (ValueError, KeyError, TypeError):
        pass
    shutil.rmtree(file.parent, ignore_errors=True)
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
