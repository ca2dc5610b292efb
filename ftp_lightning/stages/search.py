"""Stage `search`: a schedule for a budget, or for many, with the static router or, as fine-tuning, a trained one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from ftp_lightning.artifact import StageFolder
from ftp_lightning.errors import UserError
from ftp_lightning.stages.base import BUDGET_LENGTH, BudgetSettings, StageSettings, picked
from ftp_lightning.stages.option import check_bounds, check_reachable, option
from ftp_lightning.stages.progress import Progress

if TYPE_CHECKING:
    from ftp_lightning.search.settings import SearchSettings


@dataclass(frozen=True, kw_only=True)
class SearchStage(BudgetSettings, StageSettings):
    """Search the schedule of a budget nearest to dense. Writes schedule.json, with --pruned or a --router that is
    not static also pruned/.

    With --budgets one run searches a list of them and writes schedules.json, which gives a schedule for every budget
    between them. With --budget_kind flops all schedules have the mean token sparsity of the uniform one with this FLOPs
    cut: exact where blocks cost alike. metrics.json tells the cut of the schedule found.
    """

    stage: ClassVar[str] = "search"

    budget: float = option(0.3, "mean share of tokens that skip a block; see --budget_kind", least=0.0, below=1.0)
    budgets: tuple[float, ...] = option((), "search all of these, in place of --budget; writes schedules.json")
    kv: Literal["auto", "evict", "keep"] = option(
        "auto", "keys and values of skipped tokens; auto is --pruned's, or keep"
    )
    router: Literal["static", "random", "untrained"] = option(
        "static", "router to search with, where there is no --pruned; `untrained` looks at position and attention"
    )
    pruned: str | None = option(None, "folder of a trained pruner: fine-tune its schedule", is_file=True)
    schedule: str | None = option(None, "schedule(s).json to start from, besides the allocations", is_file=True)
    sensitivity: str | None = option(None, "sensitivity.json: adds allocations to start from", is_file=True)
    allocations: tuple[str, ...] = option(
        (), "start from these alone (`greedy` too); with --generations 0 the best of them is what is found"
    )
    criterion: Literal["kl", "tv", "ce", "mse", "accuracy"] = option(
        "kl",
        "loss on continuations: KL or total variation to dense, cross-entropy, error of the last state; or of --task",
    )
    task: str | None = option(None, "multiple-choice task of lm-eval for --criterion accuracy; half of it is used")
    task_data: str | None = option(None, "folder of TASK.jsonl, in the Hub's schema", is_file=True)
    windows: int = option(32, "calibration windows to measure on", least=1)
    recall_share: float = option(0.5, "share of the windows that hold facts to recall", least=0.0, most=1.0)
    batch_size: int = option(8, "windows per forward, at most the first of --stage_windows", least=1)
    step: float = option(0.05, "difference of two levels, taken so that it divides the budget", above=0.0, most=1.0)
    generations: int = option(15, "rounds of children", least=0)
    offspring: int = option(8, "children per generation", least=1)
    stage_windows: tuple[int, ...] = option(
        (), "windows that children are measured on, stage by stage, rising; default: a quarter and half of all"
    )
    survivors: tuple[int, ...] = option(
        (), "best children of each stage; the last are measured on all windows; default: a half, a quarter"
    )
    parents: int = option(2, "schedules that go on", least=1)
    tournament: int = option(1, "a child's parent is the best of so many random ones", least=1)
    switches: int = option(2, "most level switches per child", least=1)
    crossover: float = option(0.3, "probability that a child mixes two parents", least=0.0, most=1.0)
    proposed: float = option(
        0.75,
        "share of the children that a model of the loss, fitted to what was measured, proposes",
        least=0.0,
        most=1.0,
    )
    patience: int | None = option(None, "generations without a better schedule after which to stop", least=1)
    max_forward_tokens: int | None = option(None, "stop once so many tokens went through the model", least=1)
    max_seconds: float | None = option(None, "stop after so many seconds of search", above=0.0)
    min_sparsity: tuple[float, ...] = option((0.0,), "lowest sparsity of a block: one number, or one per block")
    max_sparsity: tuple[float, ...] = option((1.0,), "highest sparsity of a block: one number, or one per block")
    processes: int = option(1, "processes that share the measurements, on this machine", least=1, passive=True)

    def check(self) -> None:
        super().check()
        if (self.criterion == "accuracy") != (self.task is not None):
            raise UserError("criterion accuracy and a task need each other\nGive both, or neither.")
        if not self.budgets:
            return
        if self.budget != SearchStage.budget:
            raise UserError("budget is given beside budgets\nGive one of --budget and --budgets.")
        if self.pruned:
            raise UserError(
                "budgets are given beside a pruner, which has one schedule\nGive --budget, or leave --pruned out."
            )
        for budget in self.budgets:
            check_bounds("budgets", budget, {"least": 0.0, "most": None, "below": 1.0, "above": None})
            if self.budget_kind == "tokens":
                check_reachable(budget, self.prompt_tokens)

    @property
    def chunk(self) -> int:
        """Windows per forward: a stage's windows are whole chunks."""
        return min(self.batch_size, *self.stage_windows or (max(1, self.windows // 4),))

    @property
    def writes_pruner(self) -> bool:
        """Whether a pruner is found: stages take a schedule.json with the static router."""
        return not self.budgets and (bool(self.pruned) or self.router != "static")

    def search_settings(self) -> SearchSettings:
        """What `search.genetic` is told."""
        from ftp_lightning.search.settings import SearchSettings

        return picked(SearchSettings, self)

    def work(self, folder: StageFolder, progress: Progress) -> None:
        from ftp_lightning.models import resolve_device
        from ftp_lightning.processes import run_in
        from ftp_lightning.stages.searching import carry_out

        if self.budget_kind == "tokens":  # bad values are told before the model is loaded
            for budget in self.budgets or (self.budget,):
                replace(self, budget=budget, budgets=()).search_settings()
        device = resolve_device(self.device)
        more = (self, folder, progress.place(), folder.load_state())
        folder.adopt(run_in(self.processes, device, carry_out, *more))

    def in_tokens(self, budget: float) -> SearchStage:
        """The same settings for one budget, told in tokens."""
        return replace(self, budget=budget, budgets=(), budget_kind="tokens", budget_length=BUDGET_LENGTH)
