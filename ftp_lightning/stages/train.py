"""Stage `train`: teach the router which tokens a block needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ftp_lightning.artifact import StageFolder
from ftp_lightning.device_map import NONE
from ftp_lightning.errors import UserError
from ftp_lightning.stages.base import StageSettings, holds_family
from ftp_lightning.stages.option import check_reachable, option
from ftp_lightning.stages.progress import Progress

RouterName = Literal[
    "dynamic", "local", "recurrent", "hidden", "hidden+factors", "one_pass", "projected", "projected_once"
]


@dataclass(frozen=True, kw_only=True)
class TrainStage(StageSettings):
    """Train the router under a schedule, the model frozen. Writes pruned/ (router, schedule, settings, --skip).

    Stopped by SIGTERM or SIGUSR1 it saves and leaves; after any interruption the same command goes on.
    """

    stage: ClassVar[str] = "train"
    default_split: ClassVar[str] = "training"

    pruned: str | None = option(None, "folder of a pruner to go on from: router, schedule, settings", is_file=True)
    schedule: str | None = option(None, "schedule.json to train under", is_file=True)
    budget: float | None = option(None, "uniform schedule of this budget, without --schedule", least=0.0, below=1.0)
    dense: int = option(0, "first blocks that the uniform schedule leaves dense", least=0)
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
    guide: Literal["static", "future"] = option(
        "static", "what the guide loss teaches: the static router's decisions, or what the continuation attends to"
    )
    guide_share: float = option(0.25, "share of the steps over which the guide loss decays to 0", least=0.0, most=1.0)
    guide_decay: Literal["linear", "cosine", "constant"] = option("linear", "how it decays")
    guide_balanced: bool = option(False, "tokens to compute and tokens to skip weigh alike in the guide loss")
    gates: Literal["straight-through", "gumbel", "soft"] = option("straight-through", "how decisions get a gradient")
    key_gates: bool = option(False, "under evict gradients also tell what others lose with a token's key and value")
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
    processes: int = option(1, "processes that each take a share of the batches, on this machine", least=1)
    shard: bool = option(False, "every process holds a share of the model's blocks (FSDP)", passive=True)

    def check(self) -> None:
        if self.shard and self.device_map != NONE:
            raise UserError("shard and device_map both say where the blocks lie\nLeave one of them out.")
        if self.pruned:
            self._check_pruned()
        if self.schedule and self.budget is not None and not holds_family(self.schedule):
            raise UserError("budget is given beside a schedule that has its own\nLeave --budget or --schedule out.")
        if self.dense and (self.schedule or self.pruned):
            raise UserError("dense is about a uniform schedule, and another one is given\nLeave --dense out.")
        check_reachable(self.budget or 0.0, self.prompt_tokens)
        if self.budgets:
            self._check_budgets()
        if self.rows == "examples" and self.random_prompt:
            raise UserError("rows are examples, which have prompts of their own\nLeave --random_prompt out.")

    def _check_pruned(self) -> None:
        """UserError where something is asked of the router or pruner that the folder says already."""
        names = ("budget", "kv", "router", "width", "factors", "choice", "window", "attention", "skip")
        given = [name for name in names if getattr(self, name) != getattr(TrainStage, name)]
        if given:
            name = given[0]
            raise UserError(f"{name} is given beside a pruner that has its own\nLeave --{name} or --pruned out.")

    def _check_budgets(self) -> None:
        if len(self.budgets) != 2 or not 0 < self.budgets[0] < self.budgets[1] < 1:
            raise UserError(f"budgets are {list(self.budgets)}, must be the lowest and the highest, in (0, 1)")
        if not (self.schedule and holds_family(self.schedule)):
            raise UserError("budgets are drawn from a family of schedules\nGive its schedules.json by --schedule.")
        check_reachable(self.budgets[1], self.prompt_tokens)

    def work(self, folder: StageFolder, progress: Progress) -> None:
        from ftp_lightning.models import resolve_device
        from ftp_lightning.processes import run_in
        from ftp_lightning.stages.training import carry_out

        device = resolve_device(self.device)
        folder.adopt(run_in(self.processes, device, carry_out, self, folder, progress.place()))
