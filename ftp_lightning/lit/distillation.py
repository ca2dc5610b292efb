"""Distilled compensation: what skipped tokens get is trained until the pruned model continues as the dense one does.

    loss = mean over rows of KL(dense || pruned) per continuation token

The model is frozen and its dense path is untouched: a compensation acts on skipped tokens alone. [ours]
Below the first block that is pruned both models do the same, so what the dense one does there is computed once
(`lessons`): an epoch costs the upper blocks, in which most tokens skip.
Shapes: B rows, N blocks, D hidden size, r rank.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ftp_lightning import losses
from ftp_lightning.data.rows import Rows, scored_tokens
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.continuation import continuation_logits
from ftp_lightning.lit.checkpoints import WholeCheckpoints, sound
from ftp_lightning.lit.lessons import Lesson, lessons
from ftp_lightning.lit.trainer_device import trainer_device
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.devices import home
from ftp_lightning.routing import FixedRouter
from ftp_lightning.training.compensation import Compensation, balanced
from ftp_lightning.training.resume import BlockStates, resume_from


@dataclass(frozen=True)
class DistillationSettings:
    """How a compensation is distilled [ours]. UserError for impossible values.

    Args:
        epochs: passes over the rows; 0 trains nothing.
        learning_rate: of Adam, in units of the typical entry of what is trained; it falls to a twentieth as a cosine.
        batch_size: rows per forward. accumulate: forwards per step.
        seed: of the order of the rows.
    """

    epochs: int = 4
    learning_rate: float = 0.004
    batch_size: int = 1
    accumulate: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch_size", 1), ("accumulate", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} of a distillation is {getattr(self, name)}, must be at least {least}.")
        if not self.learning_rate > 0:
            raise UserError(f"the learning rate of a distillation is {self.learning_rate}, must be positive.")


class Distillation(L.LightningModule):
    """Trains the compensation of `pruner`, for the blocks that tokens skip; a batch is the number of a lesson.

    Its parameters are those of the maps alone, and so are its checkpoints; the model is held beside the module tree.

    Args:
        pruner: with a compensation to start from; it is not changed.
        teaching, checking: lessons to train on, and to choose the best epoch by.
    """

    def __init__(
        self,
        model: nn.Module,
        pruner: TokenPruner,
        teaching: Sequence[Lesson],
        checking: Sequence[Lesson] = (),
        settings: DistillationSettings | None = None,
    ):
        super().__init__()
        if pruner.maps is None:
            raise UserError(
                "the pruner adds nothing to skipped tokens: there is nothing to distil.\nGive it skip='low-rank' and "
                "compensation=fit_compensation(model, rows, rank=R)."
            )
        self.__dict__["model"] = model  # not through nn.Module: the frozen model stays out of checkpoints
        self.pruner, self.settings = pruner, settings or DistillationSettings()
        self.teaching, self.checking = teaching, checking
        self.start = pruner.maps
        self.blocks = [block for block, s in enumerate(pruner.scheduled.sparsity) if s > 0.0]
        self.maps = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(t[self.blocks]) for name, t in balanced(self.start).tensors.items()}
        )
        self.history: list[dict] = []
        self._epoch: list[float] = []
        self.best: tuple[float, Compensation] = (math.inf, self.start)
        self.fingerprint = ""

    def compensation(self) -> Compensation:
        """What is trained, as a pruner takes it; blocks that no token skips stay as they were given."""
        place = torch.tensor(self.blocks)
        tensors = {
            name: t.to(self.device).index_copy(0, place.to(self.device), self.maps[name.replace(".", "/")])
            for name, t in self.start.tensors.items()
        }
        return replace(self.start, tensors=tensors)

    def kl(self, lesson: Lesson) -> Tensor:
        """(B,): KL(dense || pruned) per continuation token of each row."""
        replayed = {} if lesson.keep is None else {"router": FixedRouter(**lesson.keep)}
        pruner = self.pruner.changed(compensation=self.compensation(), **replayed)
        states = BlockStates([[] for _ in range(lesson.first)] + [[lesson.entering.to(home(self.model))]])
        with resume_from(self.model, lesson.first, states), pruner(self.model):
            logits = continuation_logits(self.model, **lesson.batch)
        return losses.kl_rows(logits, lesson.teacher.to(logits.device), scored_tokens(lesson.batch))

    def training_step(self, number: Tensor, batch_idx: int) -> Tensor:
        loss = self.kl(self.teaching[int(number)]).mean()
        if not torch.isfinite(loss):
            raise UserError(f"the loss of the distillation is {loss.item()}.\nLower its learning rate.")
        self._epoch.append(loss.item())
        self.log("distil/kl", loss.detach(), batch_size=1)
        return loss

    def validation_step(self, number: Tensor, batch_idx: int) -> None:
        self._checked.append(self.kl(self.checking[int(number)]).mean().item())

    def on_validation_epoch_start(self) -> None:
        self._checked: list[float] = []

    def on_validation_epoch_end(self) -> None:
        found = sum(self._checked) / len(self._checked)
        if found < self.best[0]:
            self.best = found, self.compensation().to("cpu", torch.float32)
        trained = sum(self._epoch) / len(self._epoch) if self._epoch else None
        self._epoch = []
        self.history.append({"epoch": len(self.history), "kl": trained, "validation_kl": found})
        self.log("distil/validation_kl", found, batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint |= {
            "fingerprint": self.fingerprint,
            "history": self.history,
            "best": (self.best[0], self.best[1].tensors),
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.history, (found, tensors) = checkpoint["history"], checkpoint["best"]
        self.best = found, replace(self.start, tensors=tensors)

    def configure_optimizers(self):
        groups = [
            {"params": [p], "lr": self.settings.learning_rate * p.detach().square().mean().sqrt().clamp(1e-6).item()}
            for p in self.maps.values()
        ]
        steps = max(1, self.settings.epochs * math.ceil(len(self.teaching) / self.settings.accumulate))
        fall = torch.optim.lr_scheduler.LambdaLR(
            optimizer := torch.optim.Adam(groups, betas=(0.9, 0.99)),
            lambda step: 0.05 + 0.95 * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": fall, "interval": "step"}}


class _Lessons(L.LightningDataModule):
    """Numbers of lessons: to train in an order that (seed, epoch) alone decides, to validate in their own."""

    def __init__(self, teaching: int, checking: int, seed: int):
        super().__init__()
        self.teaching, self.checking, self.seed = teaching, checking, seed

    def train_dataloader(self) -> DataLoader:
        epoch = self.trainer.current_epoch if self.trainer else 0
        order = list(range(self.teaching))
        random.Random(f"{self.seed}/distil/{epoch}").shuffle(order)
        return DataLoader(order, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(list(range(self.checking)), batch_size=None)


def fit_distillation(
    system: Distillation,
    folder: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    fingerprint: str = "",
    between: Callable[[], None] = lambda: None,
) -> Compensation:
    """Train a system, and return the compensation of the epoch that was best on its checking lessons, the start among
    them; without any, of the last epoch.

    Args:
        folder: where the last epoch is kept, so that the same call goes on after a kill; None keeps nothing.
        progress: told (epoch, epochs).
        fingerprint: of all that decides the result; what is kept of another one is thrown away.
        between: called after each batch; what it raises ends the training.
    """
    settings = system.settings
    callbacks: list[L.Callback] = [_Progress(progress, settings.epochs, between)]
    last = None if folder is None else Path(folder) / "distillation.ckpt"
    if last is not None:
        about = {"dirpath": last.parent, "filename": last.stem, "enable_version_counter": False}
        callbacks.append(ModelCheckpoint(**about, save_on_train_epoch_end=True))
    trainer = L.Trainer(
        **trainer_device(home(system.model)),
        max_epochs=settings.epochs,
        accumulate_grad_batches=settings.accumulate,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        gradient_clip_val=None,
        logger=False,
        callbacks=callbacks,
        plugins=[LightningEnvironment(), WholeCheckpoints()],  # alone, also inside of a SLURM job
        enable_checkpointing=last is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = _Lessons(len(system.teaching), len(system.checking), settings.seed)
    system.fingerprint = fingerprint
    known = last if last is not None and _is_of(last, fingerprint) else None
    if system.checking and known is None:
        trainer.validate(system, datamodule=data, verbose=False)
    if settings.epochs:
        trainer.fit(system, datamodule=data, ckpt_path=known, weights_only=True)
    return system.best[1] if system.checking else system.compensation().to("cpu", torch.float32)


def distil_compensation(
    model: nn.Module,
    pruner: TokenPruner,
    rows: Rows,
    validation_rows: Rows | None = None,
    settings: DistillationSettings | None = None,
    folder: str | Path | None = None,
    between: Callable[[], None] = lambda: None,
) -> Compensation:
    """The compensation of `pruner`, trained on the KL of the continuation between the dense and the pruned model.

    Args:
        model: a Hugging Face causal LM in eval mode, nothing attached; it stays as it is.
        pruner: with skip="low-rank" or "mean" and a compensation to start from (`fit_compensation`).
        rows: prompts and continuations; the dense model's own answers are best (`evaluation.own_answers`).
        validation_rows: the best epoch is chosen on these.
        folder: where the last epoch is kept, so that the same call goes on after a kill.
        between: called between batches; what it raises ends the call.

    Returns a compensation in float32 on the CPU, for `pruner.changed(compensation=...)`. UserError where the pruner
    adds nothing to skipped tokens, or none skip.

    Example:
        >>> pruner = TokenPruner(router, schedule, skip="low-rank", compensation=fit_compensation(model, rows, rank=64))
        >>> pruner = pruner.changed(compensation=distil_compensation(model, pruner, rows))
    """
    settings = settings or DistillationSettings()
    about, size = (model, pruner), settings.batch_size
    checking = [] if validation_rows is None else lessons(*about, validation_rows, size, between)
    system = Distillation(*about, lessons(*about, rows, size, between), checking, settings)
    return fit_distillation(system, folder, between=between)


def _is_of(checkpoint: Path, fingerprint: str) -> bool:
    """Whether a file holds a whole checkpoint of the training with this fingerprint."""
    try:
        return sound(checkpoint)["fingerprint"] == fingerprint
    except Exception:  # torch and zipfile raise a dozen kinds for a missing or broken file
        return False


class _Progress(L.Callback):
    """Tells a function how far the distillation is, and calls another one after each batch."""

    def __init__(self, tell: Callable[[int, int], None] | None, epochs: int, between: Callable[[], None]):
        self.tell, self.epochs, self.between = tell, epochs, between

    def on_train_batch_end(self, *args) -> None:
        self.between()

    def on_validation_batch_end(self, *args) -> None:
        self.between()

    def on_train_epoch_end(self, trainer, *args) -> None:
        if self.tell is not None:
            self.tell(trainer.current_epoch + 1, self.epochs)
