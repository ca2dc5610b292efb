"""Stage `train`: teach the router which tokens a block needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ftp_lightning.artifact import StageFolder
from ftp_lightning.errors import UserError
from ftp_lightning.stages.base import StageSettings, holds_family, picked
from ftp_lightning.stages.option import check_reachable, option
from ftp_lightning.stages.progress import Progress


@dataclass(frozen=True, kw_only=True)
class TrainStage(StageSettings):
    """Train the router under a schedule, the model frozen. Writes pruned/ (router, schedule, settings; a few kB)."""

    stage: ClassVar[str] = "train"
    default_split: ClassVar[str] = "training"

    schedule: str | None = option(None, "schedule.json to train under", is_file=True)
    budget: float | None = option(None, "uniform schedule of this budget, without --schedule", least=0.0, below=1.0)
    kv: Literal["evict", "keep"] = option("keep", "skipped tokens give no keys and values (evict), or do (keep)")
    steps: int = option(200, "optimiser steps", least=1)
    batch_size: int = option(4, "windows per step", least=1)
    learning_rate: float = option(1e-2, "of Adam, decaying linearly", above=0.0)
    lambda_d: float = option(20.0, "weight of the distillation loss", least=0.0)
    lambda_s: float = option(1.0, "weight of the sparsity loss", least=0.0)
    lambda_g: float = option(1.0, "first weight of the guide loss", least=0.0)
    guide_share: float = option(0.25, "share of the steps over which the guide loss decays to 0", least=0.0, most=1.0)
    recall_share: float = option(0.5, "share of the windows that hold facts to recall", least=0.0, most=1.0)
    validations: int = option(5, "times the router is measured on validation windows", least=1)
    validation_windows: int = option(16, "windows it is measured on", least=1)

    def check(self) -> None:
        if self.schedule and self.budget is not None and not holds_family(self.schedule):
            raise UserError("budget is given beside a schedule that has its own\nLeave --budget or --schedule out.")
        check_reachable(self.budget or 0.0, self.prompt_tokens)

    def work(self, folder: StageFolder, progress: Progress) -> None:
        from ftp_lightning.lit.fitting import fit_router
        from ftp_lightning.lit.training_settings import TrainingSettings
        from ftp_lightning.pruning import TokenPruner
        from ftp_lightning.stages.inputs import load_model, mixed_windows, schedule_or_uniform
        from ftp_lightning.tracking import logging_to

        model, tokenizer = load_model(self)
        schedule = schedule_or_uniform(self.schedule, self.budget, model)
        windows = mixed_windows(self, tokenizer, self.steps * self.batch_size, self.recall_share)
        held_out = mixed_windows(self, tokenizer, self.validation_windows, self.recall_share, "validation")
        pruner = TokenPruner(self.new_router(), schedule, kv=self.kv)
        settings, place = picked(TrainingSettings, self), folder.place("checkpoints").parent

        def tell(step: int, steps: int) -> None:
            progress.step(step, steps, f"step {step} of {steps}")

        with logging_to(self.tracking, folder.place("logs").parent, self.config(), "train") as logger:
            found = fit_router(
                model,
                pruner,
                windows,
                held_out,
                settings,
                place,
                logger=logger,
                progress=tell,
                fingerprint=folder.fingerprint,
            )
        pruner.save(folder.place("pruned"), base=self.model, model=model)
        folder.write_json("metrics.json", found | {"windows": windows.hash()})
        progress.done(f"{found['parameters']} parameters, validation KL {found['best_validation_kl']:.3g}")

    def new_router(self):
        """The global router with weights drawn from the seed; the global random state is left as it was."""
        import torch

        from ftp_lightning.routing import DynamicRouter

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return DynamicRouter()
