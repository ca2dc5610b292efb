"""Carrying runs out: one process for many, or several where there are devices; what is finished is not done again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from ftp_lightning.artifact import StageFolder
from ftp_lightning.cli.progress import Progress, clock
from ftp_lightning.cli.settings import StageSettings
from ftp_lightning.errors import UserError
from ftp_lightning.products import changed_products, read_provenance
from ftp_lightning.stopping import Stopped, end_with_parent, stop_workers, unhurried

if TYPE_CHECKING:
    from ftp_lightning.studies.trial import TrialStage


def is_finished(settings: StageSettings) -> bool | None:
    """Whether the folder holds this very stage, finished: False where it holds another one, None where none."""
    found = read_provenance(settings.folder)
    if found is None:
        return None
    told = settings.config(), settings.identity(), ""
    if found.get("fingerprint") != StageFolder(settings.folder, settings.stage, *told).fingerprint:
        return False
    return None if any(changed_products(settings.folder, found)) else True  # its folder says what is wrong with it


def to_do(trials: Sequence[TrialStage]) -> list[TrialStage]:
    """Those that are not finished; UserError where one was made from other inputs or code and may not be replaced."""
    states = [is_finished(trial) for trial in trials]
    foreign = [trial.folder for trial, state in zip(trials, states) if state is False and not trial.overwrite]
    if foreign:
        others = f" and {len(foreign) - 1} more hold runs" if len(foreign) > 1 else " holds a run"
        raise UserError(
            f"{foreign[0]}{others} of other inputs or of other code of this package\n"
            "--overwrite makes those again; or give another --output."
        )
    return [trial for trial, state in zip(trials, states) if not state]


def carry_out(trials: Sequence[TrialStage], jobs: int, progress: Progress) -> list[str]:
    """Every run, `jobs` at once. A run that is refused does not stop the others; returns what was said of each."""
    failures, started = [], time.monotonic()
    for done, failure in enumerate(_each(trials, jobs), start=1):
        if failure:
            failures.append(failure)
            progress.say(failure.splitlines()[0])
        left = (time.monotonic() - started) / done * (len(trials) - done)
        progress.say(f"{done} of {len(trials)} runs" + (f", about {clock(left)} left" if left else ""))
    return failures


def _each(trials: Sequence[TrialStage], jobs: int) -> Iterator[str | None]:
    if jobs == 1:
        with _one_process():
            yield from (_run(trial) for trial in trials)
        return
    with _workers(jobs) as pool:
        for future in as_completed([pool.submit(_run, trial) for trial in trials]):
            try:
                yield future.result()
            except BrokenProcessPool:
                raise UserError("a process that made runs was killed\nRun the same command again to resume.") from None


@contextmanager
def _workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that see a GPU each, where there are any. What has not begun is not begun after an error."""
    context, gpus = get_context("spawn"), visible_gpus()
    places = context.Queue()
    for number in range(jobs):
        places.put(gpus[number % len(gpus)] if gpus else None)
    pool = ProcessPoolExecutor(jobs, context, _start_worker, (places, jobs))
    try:
        yield pool
    except Stopped:
        stop_workers()
        raise
    finally:
        with unhurried():
            pool.shutdown(cancel_futures=True)


def visible_gpus() -> list[str]:
    """The names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    import torch

    count = torch.cuda.device_count()
    told = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return told[:count] if len(told) >= count else [str(number) for number in range(count)]


@contextmanager
def _one_process() -> Iterator[None]:
    """The model is loaded once for all runs."""
    from ftp_lightning.stages.inputs import keeping_models

    with keeping_models():
        yield


_kept = ExitStack()
"""Of a worker: what stays open until it ends."""


def _start_worker(places: Any, jobs: int) -> None:
    """A worker sees one GPU, where there are any; else it has its share of the cores."""
    place = places.get()
    if place is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place  # torch looks at it when it first needs a GPU
    import torch

    from ftp_lightning.__main__ import hush

    hush()
    if place is None:
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    _kept.enter_context(_one_process())
    end_with_parent()


def _run(trial: TrialStage) -> str | None:
    """Carry one run out; returns what was wrong with it, where something was."""
    label = f"{trial.label}, seed {trial.seed}" if trial.label else trial.folder.name
    try:
        trial.execute(Progress(label))
    except UserError as error:
        return f"{label}: {error}"
    return None
