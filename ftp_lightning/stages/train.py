"""Stage `train`: teach the router which tokens a block needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftp_lightning.artifact import StageFolder
from ftp_lightning.errors import UserError
from ftp_lightning.stages.base import StageSettings, holds_family, picked
from ftp_lightning.stages.option import check_reachable, option
from ftp_lightning.stages.progress import Progress

if TYPE_CHECKING:
    from ftp_lightning.schedule_family import ScheduleFamily

RouterName = Literal["dynamic", "local", "recurrent", "hidden", "hidden+factors", "one_pass"]


@dataclass(frozen=True, kw_only=True)
class TrainStage(StageSettings):
    """Train the router under a schedule, the model frozen. Writes pruned/ (router, schedule, settings, --skip).

    Stopped by SIGTERM or SIGUSR1 it saves and leaves; after any interruption the same command goes on.
    """

    stage: ClassVar[str] = "train"
    default_split: ClassVar[str] = "training"

    schedule: str | None = option(None, "schedule.json to train under", is_file=True)
    budget: float | None = option(None, "uniform schedule of this budget, without --schedule", least=0.0, below=1.0)
    budgets: tuple[float, ...] = option((), "LOW,HIGH: every forward draws a budget; --schedule is a schedules.json")
    kv: Literal["evict", "keep"] = option("keep", "skipped tokens give no keys and values (evict), or do (keep)")
    router: RouterName = option("dynamic", "which router; `dynamic` is the global one of 450 parameters")
    width: int | None = option(None, "units of the router's hidden layer; default: the router's own", least=1)
    factors: tuple[str, ...] = option((), "factors that the router sees; default: all it knows")
    choice: Literal["topk", "threshold"] = option("topk", "exactly the scheduled tokens, or those with p above 0.5")
    window: int = option(32, "queries that the attention score averages over", least=1)
    attention: Literal["window", "exact"] = option("window", "`exact`: it averages over all computed queries")
    steps: int = option(200, "optimiser steps", least=1)
    batch_size: int = option(4, "windows per forward", least=1)
    accumulate: int = option(1, "forwards per step", least=1)
    learning_rate: float = option(1e-2, "of Adam, decaying linearly", above=0.0)
    lambda_d: float = option(20.0, "weight of the distillation loss", least=0.0)
    lambda_s: float = option(1.0, "weight of the sparsity loss", least=0.0)
    lambda_g: float = option(1.0, "first weight of the guide loss", least=0.0)
    distillation: Literal["mse", "kl", "both"] = option("mse", "of the last hidden state, of the logits, or both added")
    sparsity_loss: Literal["one-sided", "symmetric"] = option("one-sided", "whether over-pruning is penalised too")
    guide_share: float = option(0.25, "share of the steps over which the guide loss decays to 0", least=0.0, most=1.0)
    guide_decay: Literal["linear", "cosine", "constant"] = option("linear", "how it decays")
    guide_balanced: bool = option(False, "tokens to compute and tokens to skip weigh alike in the guide loss")
    gates: Literal["straight-through", "gumbel", "soft"] = option("straight-through", "how decisions get a gradient")
    temperature: tuple[float, ...] = option((1.0, 0.3), "of gumbel gates: at the first step, at the last")
    scope: Literal["prompt", "sequence"] = option("prompt", "what is routed: the prompt, or the whole text (paper)")
    random_prompt: bool = option(False, "every forward draws its prompt's length, from a quarter to three")
    recompute: bool = option(False, "activation checkpointing: less memory, more time", passive=True)
    rows: Literal["windows", "examples"] = option(
        "windows", "windows of text, or examples: instruction and chat records, the prompt routed, the response scored"
    )
    recall_share: float = option(0.5, "share of the windows that hold facts to recall", least=0.0, most=1.0)
    skip: Literal["identity", "mean", "low-rank"] = option(
        "identity", "what a skipped token gets: nothing, the block's mean update, or a fitted linear map of its state"
    )
    skip_rank: int = option(8, "rank of that map, with --skip low-rank", least=1)
    skip_windows: int = option(64, "windows of training text that mean or map are fitted on", least=1)
    validations: int = option(5, "times the router is measured on validation windows", least=1)
    validation_windows: int = option(16, "windows it is measured on", least=1)
    patience: int | None = option(None, "validations without a lower KL after which to stop", least=1)

    def check(self) -> None:
        if self.schedule and self.budget is not None and not holds_family(self.schedule):
            raise UserError("budget is given beside a schedule that has its own\nLeave --budget or --schedule out.")
        check_reachable(self.budget or 0.0, self.prompt_tokens)
        if self.budgets:
            self._check_budgets()
        if self.rows == "examples" and self.random_prompt:
            raise UserError("rows are examples, which have prompts of their own\nLeave --random_prompt out.")

    def _check_budgets(self) -> None:
        if len(self.budgets) != 2 or not 0 <= self.budgets[0] < self.budgets[1] < 1:
            raise UserError(f"budgets are {list(self.budgets)}, must be the lowest and the highest, in [0, 1)")
        if not (self.schedule and holds_family(self.schedule)):
            raise UserError("budgets are drawn from a family of schedules\nGive its schedules.json by --schedule.")
        check_reachable(self.budgets[1], self.prompt_tokens)

    def work(self, folder: StageFolder, progress: Progress) -> None:
        from ftp_lightning.data.module import WindowsData
        from ftp_lightning.lit.fitting import fit
        from ftp_lightning.lit.router_training import RouterTraining
        from ftp_lightning.lit.training_settings import TrainingSettings
        from ftp_lightning.pruning import TokenPruner
        from ftp_lightning.stages.inputs import load_model, schedule_or_uniform
        from ftp_lightning.tracking import logging_to

        model, tokenizer = load_model(self)
        family, middle = self._family(), self.budget
        if family is not None and middle is None:
            middle = sum(self.budgets) / 2
        schedule = schedule_or_uniform(self.schedule, middle, model)
        rows, held_out = self.training_rows(tokenizer)
        about = {name: getattr(self, name) for name in ("kv", "choice", "attention", "window")}
        pruner = TokenPruner(self.new_router(model), schedule, **about, **self.skipping(model, tokenizer))
        settings, place = picked(TrainingSettings, self), folder.place("checkpoints").parent
        system = RouterTraining(model, pruner, settings, family, self.budgets or (0.0, 0.0))
        whole = self.prompt_tokens + self.continuation_tokens
        drawn = (max(4, whole // 4), 3 * whole // 4) if self.random_prompt else None
        data = WindowsData(rows, held_out, self.batch_size, self.seed, drawn)

        def tell(step: int, steps: int) -> None:
            progress.step(step, steps, f"step {step} of {steps}")

        with logging_to(self.tracking, folder.place("logs").parent, self.config(), "train") as logger:
            found = fit(system, data, place, logger, tell, folder.fingerprint)
        pruner.save(folder.place("pruned"), base=self.model, model=model)
        counts = rows.counts() if self.rows == "examples" else {}
        folder.write_json("metrics.json", found | {"windows": rows.hash(), **counts})
        progress.done(f"{found['parameters']} parameters, validation KL {found['best_validation_kl']:.3g}")

    def training_rows(self, tokenizer) -> tuple[Any, Any]:
        """What the router is trained on, and what it is measured on."""
        from ftp_lightning.stages.inputs import mixed_windows

        total = self.steps * self.accumulate * self.batch_size
        sizes = ((self.chosen_split, total), ("validation", self.validation_windows))
        if self.rows == "windows":
            return tuple(mixed_windows(self, tokenizer, n, self.recall_share, split) for split, n in sizes)
        from ftp_lightning.data.examples import load_examples

        limits = (tokenizer, self.prompt_tokens, self.continuation_tokens)
        return tuple(load_examples(self.data, split, *limits).sample(n, self.seed) for split, n in sizes)

    def skipping(self, model, tokenizer) -> dict[str, Any]:
        """What the pruner is told of --skip; mean or map are fitted here, before the router is trained with them."""
        if self.skip == "identity":
            return {}
        from ftp_lightning.pruning.compensation import fit_compensation
        from ftp_lightning.stages.inputs import mixed_windows

        windows = mixed_windows(self, tokenizer, self.skip_windows, self.recall_share)
        rank = self.skip_rank if self.skip == "low-rank" else 0
        return {"skip": self.skip, "compensation": fit_compensation(model, windows, rank, batch_size=self.batch_size)}

    def _family(self) -> ScheduleFamily | None:
        if not self.budgets:
            return None
        from ftp_lightning.schedule_family import ScheduleFamily

        family = ScheduleFamily.load(self.schedule)
        family.at(self.budgets[1])  # UserError where it does not reach so far
        return family

    def new_router(self, model: Any):
        """The router with weights drawn from the seed; the global random state is left as it was."""
        import torch

        from ftp_lightning.routing import make_router
        from ftp_lightning.stages.inputs import num_blocks

        options = {"width": self.width, "names": self.factors or None}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            try:
                return make_router(
                    self.router, num_blocks(model), model.config.get_text_config().hidden_size, **options
                )
            except ValueError as error:
                raise UserError(f"factors: {error}") from None
