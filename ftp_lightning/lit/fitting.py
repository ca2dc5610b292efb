"""Running router training: Lightning's Trainer, checkpoints without the model, and going on where it was stopped."""

from __future__ import annotations

import copy
import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.fsdp import FSDPModule

from ftp_lightning import stopping
from ftp_lightning.data.module import RowsData
from ftp_lightning.launcher import Place
from ftp_lightning.lit.checkpoints import (
    BEST,
    HISTORY,
    LAST,
    WholeCheckpoints,
    history_digest,
    read_history,
    step_to_resume,
)
from ftp_lightning.lit.router_training import RouterTraining
from ftp_lightning.lit.trainer_device import trainer_device
from ftp_lightning.lit.training_settings import TrainingSettings
from ftp_lightning.processes import Processes
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.devices import home
from ftp_lightning.started import Started
from ftp_lightning.whole_files import write_text


def fit(
    system: RouterTraining,
    data: RowsData,
    folder: Path,
    logger=None,
    progress: Callable[[int, int], None] | None = None,
    fingerprint: str = "",
    processes: Processes | None = None,
) -> dict:
    """Train the system's router in place and keep the state that was best on the validation rows, be it the one that
    it came with (under the choice `threshold`: the last).

    `folder`/checkpoints holds the last and the best state (router, optimiser, counters; never the model) and the
    history, from which the same call goes on: the result is that of a training without interruption, to the bit on a
    CPU. SIGTERM, SIGINT, SIGHUP and SIGUSR1 save and leave with the exit status 128 + signal; all handlers are put back
    afterwards.

    Args:
        progress: told (step, steps).
        fingerprint: of all that decides the result; checkpoints of another one are refused, and without one no
            checkpoint is resumed.
        processes: those that train together, each with a share of the batches: W of them are one that accumulates W
            times as many. Every one of them calls this function with equal arguments.

    Returns the stage's metrics: the curve of every loss, validation KL, target, soft and realised sparsity per block.
    """
    settings, pruner, place = system.settings, system.pruner, Path(folder) / "checkpoints"
    processes = processes or Processes()
    resume = processes.from_first(step_to_resume(place, fingerprint) if processes.rank == 0 else None)
    system.fingerprint, record = fingerprint, History(system, place / HISTORY)
    given = copy.deepcopy(system.state_dict())
    best = ModelCheckpoint(place, "best", monitor="validation_kl", enable_version_counter=False)
    last = ModelCheckpoint(place, "last", enable_version_counter=False)  # behind: it holds what the best one knows
    ending = [_MeasureLast(settings.steps), _Leaving(place / LAST), _Progress(progress, settings.steps)]
    callbacks: list[L.Callback] = [record, best, last, *ending]
    if settings.patience is not None:
        callbacks.append(EarlyStopping("validation_kl", patience=settings.patience))
    trainer = _trainer(system, processes, logger, callbacks)
    if not isinstance(system.decoder, FSDPModule):  # a sharded model's forward needs all processes
        data.shares_validation, system.gather = True, processes.gather
    before: dict[int, Any] = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    try:
        if resume is None:
            trainer.validate(system, datamodule=data, verbose=False)
        else:
            data.batches_done = resume * settings.accumulate * processes.count
        with stopping.unhurried():
            trainer.fit(system, datamodule=data, ckpt_path=None if resume is None else place / LAST, weights_only=True)
    finally:
        stopping.put_back(before)  # Lightning leaves its own behind
    if best.best_model_path and pruner.choice == "topk":  # under `threshold` the best state prunes least
        before = system.validations[0]["kl"] <= best.best_model_score.item()
        trained = None if before else torch.load(place / BEST, weights_only=True)["state_dict"]
        system.load_state_dict(given if before else trained)
    pruner.router.eval()
    return _metrics(system, best.best_model_score)


def _trainer(system: RouterTraining, processes: Processes, logger, callbacks: list[L.Callback]) -> L.Trainer:
    settings = system.settings
    return L.Trainer(
        **trainer_device(home(system.model)) | _together(processes),
        max_steps=settings.steps,
        accumulate_grad_batches=settings.accumulate,
        inference_mode=not isinstance(system.decoder, FSDPModule),  # it would gather weights that no graph may hold
        val_check_interval=settings.validation_interval * settings.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=logger or False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def _metrics(system: RouterTraining, best_kl: torch.Tensor | None) -> dict:
    return {
        "parameters": system.router.parameter_count,
        "steps": system.history,
        "validation_kl": system.validations,
        "best_validation_kl": min(best_kl.item(), system.validations[0]["kl"]) if best_kl is not None else None,
        "target_sparsity": list(system.pruner.scheduled.sparsity),
        "soft_sparsity": system.last_soft,
        "realised_sparsity": system.last_realised,
    }


def _together(processes: Processes) -> dict:
    """What the Trainer is told of the processes: they are there, and in touch."""
    if processes.count == 1:
        return {"plugins": [LightningEnvironment(), WholeCheckpoints()]}  # alone, also inside of a SLURM job
    fabric: Any = processes.fabric
    nodes = fabric.strategy.num_nodes
    place = Place(processes.rank, processes.count, fabric.local_rank, fabric.node_rank, nodes)
    strategy = DDPStrategy(cluster_environment=Started(place), find_unused_parameters=True)
    counts = {"devices": processes.count // nodes, "num_nodes": nodes, "plugins": [WholeCheckpoints()]}
    return counts | {"strategy": strategy, "use_distributed_sampler": False}


class History(L.Callback):
    """Every step and validation, a line each, so that checkpoints stay small; a resumed training reads what was."""

    def __init__(self, system: RouterTraining, path: Path):
        self.system, self.path, self.written = system, path, [0, 0]

    def on_fit_start(self, trainer, system) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def on_load_checkpoint(self, trainer, system, checkpoint) -> None:
        system.history, system.validations = read_history(self.path, checkpoint["global_step"])
        if trainer.is_global_zero:
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in [*system.validations, *system.history]))
        self.written = [len(system.history), len(system.validations)]

    def on_save_checkpoint(self, trainer, system, checkpoint) -> None:
        """By this the rows that a resumed training reads are known to be those that were."""
        done = checkpoint["global_step"]
        kept = system.history, system.validations
        steps, validations = ([row for row in rows if row["step"] <= done] for rows in kept)
        checkpoint["history"] = history_digest((steps, validations))

    def on_train_batch_end(self, trainer, *args) -> None:
        self._write(trainer)

    def on_validation_end(self, trainer, *args) -> None:
        self._write(trainer)

    def _write(self, trainer) -> None:
        if not trainer.is_global_zero or not self.path.parent.exists():  # before training there is no folder yet
            return
        kept = self.system.history, self.system.validations
        fresh = [row for rows, before in zip(kept, self.written) for row in rows[before:]]
        with self.path.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in fresh)
        self.written = list(map(len, kept))


class _MeasureLast(L.Callback):
    """Has the last step measured on the validation rows, wherever the validations before it fell."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step >= self.steps:
            trainer.val_check_batch = 1  # Lightning validates where it divides the number of the batch


class _Leaving(L.Callback):
    """Saves and leaves at the end of the step in which a signal has come, or of the validation that is due then; all
    processes do so together."""

    def __init__(self, path: Path):
        self.path, self.received, self.since, self.validated = path, 0, 0.0, False

    def on_train_start(self, trainer, *args) -> None:
        if threading.current_thread() is not threading.main_thread():  # there alone handlers may be set
            return
        for number in stopping.SIGNALS:
            # a scheduler's requeue hears SIGUSR1 itself, `nohup` ignores SIGHUP; at SIGTERM Lightning listens already
            if number == signal.SIGTERM or stopping.may_replace(number):
                signal.signal(number, self._hear)

    def _hear(self, number: int, frame) -> None:
        if not self.received:
            self.received, self.since = number, time.monotonic()
        elif stopping.is_second(self.since):
            stopping.leave_now(number)

    def on_train_batch_end(self, trainer, system, outputs, batch, batch_idx: int) -> None:
        self.validated = (batch_idx + 1) % trainer.val_check_batch == 0  # next, and its checkpoint saved after it
        if not system.within_step and not self.validated and self._is_told(trainer):
            trainer.save_checkpoint(self.path, weights_only=False)
            self._leave()

    def on_train_batch_start(self, trainer, system, *args) -> None:
        if self.validated and self._is_told(trainer):
            self._leave()

    def _is_told(self, trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(bool(self.received), all=False)

    def _leave(self) -> None:
        raise stopping.Stopped(self.received or signal.SIGTERM)


class _Progress(L.Callback):
    """Tells a function how far training is."""

    def __init__(self, tell, steps: int):
        self.tell, self.steps = tell, steps

    def on_train_batch_end(self, trainer, *args) -> None:
        if self.tell is not None:
            self.tell(trainer.global_step, self.steps)


def fit_router(
    model,
    pruner: TokenPruner,
    train_rows,
    validation_rows,
    settings: TrainingSettings,
    folder,
    logger=None,
    progress=None,
    fingerprint: str = "",
) -> dict:
    """`fit` of the pruner's router under its schedule, on rows."""
    system = RouterTraining(model, pruner, settings)
    data = RowsData(train_rows, validation_rows, settings.batch_size, settings.seed)
    return fit(system, data, folder, logger, progress, fingerprint)
