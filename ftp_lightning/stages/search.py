"""Stage `search`: a schedule for a budget, or for many, with the static router or, as fine-tuning, a trained one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftp_lightning.artifact import StageFolder
from ftp_lightning.cli.kv import AUTO, given_modes, kv_option
from ftp_lightning.cli.option import check_bounds, check_reachable, option
from ftp_lightning.cli.progress import Progress
from ftp_lightning.cli.settings import BUDGET_LENGTH, BudgetSettings, RowsSettings, StageSettings, picked
from ftp_lightning.errors import UserError
from ftp_lightning.stages.run_work import searched

if TYPE_CHECKING:
    import torch

    from ftp_lightning.processes import Processes
    from ftp_lightning.pruning import TokenPruner
    from ftp_lightning.schedule import Schedule
    from ftp_lightning.search.fitness import MemoFitness
    from ftp_lightning.search.genetic import SearchResult
    from ftp_lightning.search.settings import SearchSettings


@dataclass(frozen=True, kw_only=True)
class SearchStage(BudgetSettings, RowsSettings, StageSettings):
    """Search for the schedule of a budget that loses least. Writes schedule.json; with --pruned, or a --router that is
    not static, also pruned/.

    With --budgets one run searches a list of them and writes schedules.json, which gives a schedule for every budget
    between them. With --budget_kind flops all schedules have the mean token sparsity of the uniform one with this FLOPs
    cut: exact where blocks cost alike. metrics.json tells the cut of the schedule found. With --search_kv as well every
    schedule is scaled to the cut in its own modes.
    """

    stage: ClassVar[str] = "search"

    budget: float = option(0.3, "mean share of tokens that skip a block; see --budget_kind", least=0.0, below=1.0)
    budgets: tuple[float, ...] = option((), "search all of these, in place of --budget; writes schedules.json")
    kv: str = kv_option(
        AUTO,
        "keys and values of skipped tokens; auto is the mode of --pruned, --schedule or --allocations default, or keep",
        AUTO,
    )
    search_kv: bool = option(False, "search the kv mode of every block as well, in place of --kv")
    router: Literal["static", "random", "untrained"] = option(
        "static", "router to search with, where there is no --pruned; `untrained` looks at position and attention"
    )
    pruned: str | None = option(None, "folder of a trained pruner: fine-tune its schedule", is_file=True)
    schedule: str | None = option(None, "schedule(s).json to start from, besides the allocations", is_file=True)
    sensitivity: str | None = option(None, "sensitivity.json: adds allocations to start from", is_file=True)
    allocations: tuple[str, ...] = option(
        (),
        "start from these allocations only (`greedy` is possible); with --generations 0 the best of them is the result",
    )
    criterion: Literal["kl", "tv", "ce", "mse", "accuracy"] = option(
        "kl",
        "loss on continuations: KL or total variation to dense, cross-entropy, error of the last state; or of --task",
    )
    task: str | None = option(
        None, "multiple-choice task of lm-eval for --criterion accuracy; `evaluate` leaves out what is searched on"
    )
    task_data: str | None = option(None, "folder of TASK.jsonl, in the Hub's schema", is_file=True)
    windows: int = option(32, "calibration rows to measure on, at most", least=1, most=10**7)
    recall_share: float = option(0.5, "share of the windows that hold facts to recall", least=0.0, most=1.0)
    batch_size: int = option(8, "rows per forward, at most the first of --stage_windows", least=1, most=10**6)
    step: float = option(
        0.05, "distance of two sparsity levels; it is made to divide the budget", least=0.001, most=1.0
    )
    generations: int = option(15, "generations of the search", least=0, most=10**5)
    offspring: int = option(8, "children per generation", least=1, most=10**5)
    stage_windows: tuple[int, ...] = option(
        (), "windows that children are measured on, stage by stage, rising; default: a quarter and half of all"
    )
    survivors: tuple[int, ...] = option(
        (), "best children of each stage; the last are measured on all windows; default: a half, a quarter"
    )
    parents: int = option(2, "schedules that survive a generation", least=1, most=10_000)
    tournament: int = option(1, "a child's parent is the best of so many random ones", least=1, most=10_000)
    switches: int = option(2, "most level switches per child", least=1, most=10_000)
    crossover: float = option(0.3, "probability that a child mixes two parents", least=0.0, most=1.0)
    proposed: float = option(
        0.75,
        "share of the children that a model of the loss proposes, fitted to the measured schedules",
        least=0.0,
        most=1.0,
    )
    patience: int | None = option(None, "generations without a better schedule after which to stop", least=1)
    max_forward_tokens: int | None = option(None, "stop after so many forward tokens", least=1)
    max_seconds: float | None = option(None, "stop after so many seconds of search", above=0.0)
    min_sparsity: tuple[float, ...] = option((0.0,), "lowest sparsity of a block: one number, or one per block")
    max_sparsity: tuple[float, ...] = option((1.0,), "highest sparsity of a block: one number, or one per block")
    processes: int = option(
        1, "processes that share the measurements, on this machine", least=1, most=1024, passive=True
    )

    def check(self) -> None:
        super().check()
        if (self.criterion == "accuracy") != (self.task is not None):
            raise UserError(
                "--criterion accuracy needs --task, and --task needs --criterion accuracy\nGive both, or neither."
            )
        if self.search_kv:
            self._check_search_kv()
        if not self.budgets:
            return
        if self.budget != SearchStage.budget:
            raise UserError("--budget cannot be combined with --budgets\nRemove one of them.")
        if self.pruned:
            raise UserError(
                "--budgets cannot be combined with --pruned: a pruner has one schedule\n"
                "Give --budget, or leave --pruned out."
            )
        for budget in self.budgets:
            check_bounds("budgets", budget, {"least": 0.0, "most": None, "below": 1.0, "above": None})
            if self.budget_kind == "tokens":
                check_reachable(budget, self.prompt_tokens)

    def _check_search_kv(self) -> None:
        """UserError where something else is said of the modes, or cannot be kept while they change."""
        if self.kv != AUTO:
            raise UserError(
                "--kv cannot be combined with --search_kv, which finds the mode of every block\nRemove one of them."
            )
        if self.budget_kind == "flops" and self.budgets:
            raise UserError(
                "--search_kv does not take several FLOPs budgets\nGive one --budget, or leave --search_kv out."
            )
        bounded = (self.min_sparsity, self.max_sparsity) != (SearchStage.min_sparsity, SearchStage.max_sparsity)
        if self.budget_kind == "flops" and bounded:
            raise UserError(
                "min_sparsity and max_sparsity cannot be kept by --search_kv, which scales schedules to a budget of "
                "FLOPs\nLeave the bounds out, or give --budget_kind tokens."
            )

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

        if self.budget_kind == "tokens":  # bad values are told before the model is loaded
            for budget in self.budgets or (self.budget,):
                replace(self, budget=budget, budgets=()).search_settings()
        device = resolve_device(self.device)
        more = (self, folder, progress.place(), folder.load_state())
        folder.adopt(run_in(self.processes, device, carry_out, *more))

    def in_tokens(self, budget: float) -> SearchStage:
        """The same settings for one budget, told in tokens."""
        return replace(self, budget=budget, budgets=(), budget_kind="tokens", budget_length=BUDGET_LENGTH)


def carry_out(
    processes: Processes,
    device: torch.device,
    settings: SearchStage,
    folder: StageFolder,
    timing: dict[str, Any],
    state: dict | None,
) -> list[str]:
    """Search, the same in every process; the first saves, logs and writes. Returns the names of the files written.

    timing: `Progress.place`; state: what an interrupted search has saved, read before any process writes a new one.
    """
    from ftp_lightning.schedule import Schedule
    from ftp_lightning.stages.inputs import load_model, token_budget
    from ftp_lightning.tracking import logging_to

    model, tokenizer = load_model(settings, device)
    start = starting_pruner(settings, model)
    first, progress = processes.rank == 0, Progress(**timing)
    budgets = sorted(set(settings.budgets)) or [settings.budget]
    where = settings, model, "keep" if settings.search_kv else start.kv  # a cut that all modes can make
    ranks = {budget: start.rank_under(Schedule.uniform(len(start.kv), budget)) for budget in budgets}
    asked = {one: settings.in_tokens(token_budget(*where, one, ranks[one]) or 0.0) for one in budgets}
    fitness, text = _fitness(settings, model, tokenizer, start)
    if first:
        what = settings.rows if settings.task is None else f"items of {settings.task}"
        progress.say(f"measuring the allocations on {sum(fitness.sizes)} {what}")
    job = "finetune" if settings.pruned else "search"
    logging = logging_to(settings.tracking, folder.place("logs").parent, settings.config(), job) if first else None
    with logging or nullcontext() as logger:
        listener = _Listener(settings, folder, progress, logger) if first else None
        repair = _repair(settings, model, ranks[budgets[0]])
        found = _search(asked, start, fitness, listener, state, processes, repair)
        if first:
            _write(settings, folder, model, start, found, text)
            _track(logger, settings, folder, (model, tokenizer), start, found)
    if first:
        progress.done(_conclusion(found))
    return folder.files


def _fitness(settings: SearchStage, model: Any, tokenizer: Any, start: TokenPruner) -> tuple[MemoFitness, dict]:
    """What is minimised, and the hash of what it is measured on; of tasks also how far is looked (`Schedule.seen`)."""
    from ftp_lightning.search.criteria import CRITERIA
    from ftp_lightning.search.fitness import ContinuationFitness
    from ftp_lightning.stages.inputs import measured_rows

    if settings.task is not None:
        from ftp_lightning.search.accuracy import TaskAccuracy, seen_by, task_items
        from ftp_lightning.stages.task_files import local_file

        items = task_items(settings.task, local_file(settings.task, settings.task_data), settings.windows)
        fitness = TaskAccuracy(model, tokenizer, items, start.with_schedule, settings.chunk, settings.batch_size)
        return fitness, {"items": fitness.identity()["items"], "seen": seen_by(items)}
    rows = measured_rows(settings, model, tokenizer, settings.windows, settings.recall_share)
    criterion = CRITERIA[settings.criterion]()
    on_text = ContinuationFitness(model, rows, start.with_schedule, settings.chunk, criterion)
    return on_text, {"rows_hash": rows.hash()} | rows.counts()


def starting_pruner(settings: SearchStage, model: Any) -> TokenPruner:
    """The pruner whose schedule is searched; a new one is dense until it is given one."""
    from ftp_lightning.pruning import TokenPruner
    from ftp_lightning.routing import make_router
    from ftp_lightning.schedule import Schedule
    from ftp_lightning.stages.inputs import in_mode, load_pruner, num_blocks

    if not settings.pruned:
        dense = Schedule.uniform(num_blocks(model), 0.0)
        router = make_router(settings.router, dense.num_blocks, hidden_size=1, seed=settings.seed)  # none reads states
        return TokenPruner(router, dense, kv=_mode(settings, dense.num_blocks))
    return in_mode(load_pruner(settings.pruned, model), settings.kv)


def _mode(settings: SearchStage, blocks: int) -> Any:
    """The kv mode to search for: --kv, else that of the schedule to start from, else keep."""
    from ftp_lightning.schedule import Schedule
    from ftp_lightning.stages.inputs import DEFAULT_KV, read_schedule

    if (modes := given_modes(settings.kv)) is not None:
        return modes
    given = read_schedule(settings.schedule, settings.budget) if settings.schedule else None
    if given is None and settings.allocations == ("default",):
        return Schedule.default(blocks, settings.budget).kv
    return given.kv if given is not None and given.kv else DEFAULT_KV


def _repair(settings: SearchStage, model: Any, rank: int) -> Callable[[Schedule], Schedule] | None:
    """What keeps a FLOPs cut while modes change; a share of tokens needs nothing."""
    from ftp_lightning.search.flops_budget import FlopsCut

    if not settings.search_kv or settings.budget_kind == "tokens":
        return None
    return FlopsCut(model, settings.budget, settings.budget_length, rank)


class _Listener:
    """Hears of every generation: the state goes to disk, the numbers to the logger, a line to the terminal."""

    def __init__(self, settings: SearchStage, folder: StageFolder, progress: Progress, logger: Any):
        self.settings, self.folder, self.progress, self.logger = settings, folder, progress, logger
        self.searches = max(1, 2 * len(settings.budgets) - 1)  # at most: in ascending order, and again in descending

    def __call__(self, state: dict) -> None:
        self.folder.save_state(state)
        current = state.get("current", state)
        done = len(state.get("done", ())) + len(state.get("again", ()))
        generation, entry, total = current["generation"], current["log"][-1], self.settings.generations
        step = done * (total + 1) + generation
        if self.logger:
            names = ("best", "mean", "forward_tokens")
            self.logger.log_metrics({f"search/{key}": entry[key] for key in names}, step=step)
        budget = f"budget {current['settings']['budget']:.0%}, " if self.searches > 1 else ""
        best = f"best {self.settings.criterion} {entry['best']:.3g}, {entry['forward_tokens']:,} forward tokens"
        what = f"{budget}generation {generation} of {total}, {best}"
        whole = searched(self.settings, total)
        self.progress.step(done * whole + searched(self.settings, generation), self.searches * whole, what)

    def going_on(self, state: dict) -> None:
        current = state.get("current", state)
        self.progress.say(f"going on after generation {current['generation']}")


def _search(
    asked: dict[float, SearchStage],
    start: TokenPruner,
    fitness: MemoFitness,
    listener: _Listener | None,
    state: dict | None,
    processes: Processes,
    repair: Callable[[Schedule], Schedule] | None = None,
) -> dict[float, SearchResult]:
    """Budget as it was asked for -> what was found; asked: the settings of each, told in tokens. repair: see
    `genetic_search`."""
    from ftp_lightning.search.family import search_family
    from ftp_lightning.search.genetic import genetic_search
    from ftp_lightning.stages.starting_schedules import starting_schedules

    if state is not None and listener is not None:
        listener.going_on(state)
    blocks, (first, *others) = start.scheduled.num_blocks, asked.values()
    seeds = {one.budget: starting_schedules(one, start, fitness) for one in asked.values()}
    own = first.search_settings()
    if not others:
        more = listener, state, processes, repair
        found = {first.budget: genetic_search(fitness, blocks, own, seeds[first.budget], *more)}
    else:
        found = search_family(fitness, blocks, own, seeds, listener, state, processes)
    return {budget: found[one.budget] for budget, one in asked.items()}


def _write(
    settings: SearchStage,
    folder: StageFolder,
    model: Any,
    start: TokenPruner,
    found: dict[float, SearchResult],
    more: dict,
) -> None:
    """schedule.json (a family: schedules.json), pruned/ where one was fine-tuned, metrics.json."""
    from ftp_lightning.costs.flops import flops_reduction
    from ftp_lightning.schedule_family import ScheduleFamily
    from ftp_lightning.stages.inputs import read_schedule

    def metrics(result: SearchResult) -> dict[str, Any]:
        numbers = {"value": result.value, "allocations": result.allocations, "generations": result.generations}
        if settings.budget_kind == "flops":
            kv = result.schedule.kv or start.kv
            cut = flops_reduction(
                model, result.schedule, settings.budget_length, kv, rank=start.rank_under(result.schedule)
            )
            numbers["flops_reduction"] = cut
        return numbers | {"stopped": result.stopped}

    given = [read_schedule(settings.schedule, settings.budget).seen] if settings.schedule else []

    def told(schedule: Schedule) -> Schedule:
        """With the kv mode it was found for, and the documents it was selected on."""
        return schedule.under(schedule.kv or start.kv).after(start.scheduled.seen, more.get("seen", {}), *given)

    if settings.budgets:
        schedules = [told(result.schedule) for result in found.values()]
        ScheduleFamily(schedules).save(folder.place("schedules.json"))
        folder.write_json("metrics.json", {"budgets": {str(b): metrics(one) for b, one in found.items()}} | more)
        return
    (result,) = found.values()
    schedule = told(result.schedule)
    schedule.save(folder.place("schedule.json"))
    if settings.writes_pruner:
        start.with_schedule(schedule).save(folder.place("pruned"), base=settings.model, model=model)
    folder.write_json("metrics.json", metrics(result) | more)


def _track(
    logger: Any,
    settings: SearchStage,
    folder: StageFolder,
    loaded: tuple[Any, Any],
    start: TokenPruner,
    found: dict[float, SearchResult],
) -> None:
    """Schedules and gates as images, what the search started from as a table, the pruner that was fine-tuned."""
    from ftp_lightning.stages.routed_story import pruner_images
    from ftp_lightning.tracking import log_outcome

    several = len(found) > 1
    images = {
        f"{name}{f' at {budget:.0%}' if several else ''}": draw
        for budget, result in found.items()
        for name, draw in pruner_images(settings, *loaded, start.with_schedule(result.schedule)).items()
    }
    rows = [
        {"budget": budget, "start": name, "loss": loss, "found": result.value}
        for budget, result in found.items()
        for name, loss in result.allocations.items()
    ]
    pruned = folder.path / "pruned" if settings.writes_pruner else None
    log_outcome(logger, images=images, tables={"starts": rows}, pruned=pruned)


def _conclusion(found: dict[float, SearchResult]) -> str:
    if len(found) > 1:
        return "; ".join(f"{budget:.0%}: {result.value:.3g}" for budget, result in found.items())
    (result,) = found.values()
    rival = min(result.allocations, key=result.allocations.__getitem__)
    best = f"best allocation to start from: {rival}, {result.allocations[rival]:.3g}"
    return f"loss {result.value:.3g} after {result.generations[-1]['forward_tokens']:,} forward tokens; {best}"
