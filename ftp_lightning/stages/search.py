"""Stage `search`: a schedule for a budget, with the static router or, as fine-tuning, with a trained one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftp_lightning.artifact import StageFolder
from ftp_lightning.stages.base import BUDGET_LENGTH, BudgetSettings, StageSettings, picked
from ftp_lightning.stages.option import option
from ftp_lightning.stages.progress import Progress

if TYPE_CHECKING:
    from ftp_lightning.pruning import TokenPruner


@dataclass(frozen=True, kw_only=True)
class SearchStage(BudgetSettings, StageSettings):
    """Search the schedule of a budget nearest to dense. Writes schedule.json, with --pruned also pruned/.

    With --budget_kind flops all schedules have the mean token sparsity of the uniform one with this FLOPs cut: exact
    where blocks cost alike. metrics.json tells the cut of the schedule found.
    """

    stage: ClassVar[str] = "search"

    budget: float = option(0.3, "mean share of tokens that skip a block; see --budget_kind", least=0.0, below=1.0)
    kv: Literal["auto", "evict", "keep"] = option(
        "auto", "keys and values of skipped tokens; auto is --pruned's, or keep"
    )
    router: Literal["static", "random"] = option("static", "router to search with, where there is no --pruned")
    pruned: str | None = option(None, "folder of a trained pruner: fine-tune its schedule", is_file=True)
    schedule: str | None = option(None, "schedule.json to start from, besides the allocations", is_file=True)
    sensitivity: str | None = option(None, "sensitivity.json: adds two allocations to start from", is_file=True)
    windows: int = option(32, "calibration windows to measure on", least=1)
    recall_share: float = option(0.5, "share of the windows that hold facts to recall", least=0.0, most=1.0)
    batch_size: int = option(8, "windows per forward", least=1)
    step: float = option(0.05, "difference of two levels, taken so that it divides the budget", above=0.0, most=1.0)
    generations: int = option(10, "rounds of children", least=0)
    offspring: int = option(12, "children per generation", least=1)
    survivors: int = option(3, "best children, measured on all windows", least=1)
    parents: int = option(2, "schedules that go on", least=1)
    switches: int = option(2, "most level switches per child", least=1)
    crossover: float = option(0.3, "probability that a child mixes two parents", least=0.0, most=1.0)
    stage_windows: int = option(8, "windows that the children are measured on", least=1)
    patience: int | None = option(None, "generations without a better schedule after which to stop", least=1)
    max_sparsity: float = option(1.0, "highest sparsity of a block", above=0.0, most=1.0)

    def work(self, folder: StageFolder, progress: Progress) -> None:
        from ftp_lightning.pruning.flops import flops_reduction
        from ftp_lightning.search.fitness import ContinuationFitness
        from ftp_lightning.search.genetic import SearchSettings, genetic_search
        from ftp_lightning.stages.inputs import load_model, mixed_windows, token_budget
        from ftp_lightning.stages.seeds import starting_schedules
        from ftp_lightning.tracking import logging_to

        if self.budget_kind == "tokens":
            picked(SearchSettings, self)  # bad values are told before the model is loaded
        model, tokenizer = load_model(self)
        start = self.start(model)
        asked = self.in_tokens(token_budget(self, model, start.kv))
        search_settings = picked(SearchSettings, asked)
        seeds = starting_schedules(asked, start)
        windows = mixed_windows(self, tokenizer, self.windows, self.recall_share)
        job = "finetune" if self.pruned else "search"

        progress.say(f"measuring {len(seeds)} allocations on {len(windows)} windows")
        fitness = ContinuationFitness(model, windows, start.with_schedule, self.batch_size)
        with logging_to(self.tracking, folder.place("logs").parent, self.config(), job) as logger:

            def on_generation(state: dict) -> None:
                folder.save_state(state)
                self.tell(state, logger, progress)

            blocks, state = start.schedule.num_blocks, folder.load_state()
            found = genetic_search(fitness, blocks, search_settings, seeds, on_generation, resume=state)
        found.schedule.save(folder.place("schedule.json"))
        if self.pruned:
            start.with_schedule(found.schedule).save(folder.place("pruned"), base=self.model, model=model)
        metrics = {"value": found.value, "allocations": found.allocations, "generations": found.generations}
        if self.budget_kind == "flops":
            metrics["flops_reduction"] = flops_reduction(model, found.schedule, self.budget_length, start.kv)
        folder.write_json("metrics.json", metrics | {"windows": windows.hash()})
        rival = min(found.allocations, key=found.allocations.__getitem__)
        progress.done(f"KL {found.value:.3g}; best allocation to start from: {rival}, {found.allocations[rival]:.3g}")

    def in_tokens(self, budget: float) -> SearchStage:
        """The same settings, the budget told in tokens."""
        return replace(self, budget=budget, budget_kind="tokens", budget_length=BUDGET_LENGTH)

    def tell(self, state: dict, logger: Any, progress: Progress) -> None:
        """One generation is over."""
        done, entry = state["generation"], state["log"][-1]
        if logger:
            logger.log_metrics({f"search/{key}": entry[key] for key in ("best", "mean", "forward_tokens")}, step=done)
        progress.step(done, self.generations, f"generation {done} of {self.generations}, best KL {entry['best']:.3g}")

    def start(self, model: Any) -> TokenPruner:
        """The pruner whose schedule is searched; a new one is dense until it is given one."""
        from ftp_lightning.pruning import TokenPruner
        from ftp_lightning.routing import RandomRouter, StaticRouter
        from ftp_lightning.schedule import Schedule
        from ftp_lightning.stages.inputs import load_pruner, num_blocks

        if not self.pruned:
            dense = Schedule.uniform(num_blocks(model), 0.0)
            router = RandomRouter(self.seed) if self.router == "random" else StaticRouter()
            return TokenPruner(router, dense, kv="keep" if self.kv == "auto" else self.kv)
        trained = load_pruner(self.pruned, model)
        changes = {} if self.kv == "auto" else {"kv": self.kv}
        return TokenPruner(trained.router, trained.schedule, **trained.settings() | changes)
