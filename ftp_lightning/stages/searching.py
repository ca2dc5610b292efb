"""What one process of a search does: read the inputs, search, and, if it is the first, write what was found."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from ftp_lightning.artifact import StageFolder
from ftp_lightning.processes import Processes
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.flops import flops_reduction
from ftp_lightning.routing import make_router
from ftp_lightning.schedule import Schedule
from ftp_lightning.schedule_family import ScheduleFamily
from ftp_lightning.search.criteria import CRITERIA
from ftp_lightning.search.family import search_family
from ftp_lightning.search.fitness import ContinuationFitness, MemoFitness
from ftp_lightning.search.genetic import SearchResult, genetic_search
from ftp_lightning.stages.inputs import load_model, load_pruner, mixed_windows, num_blocks, token_budget
from ftp_lightning.stages.progress import Progress
from ftp_lightning.stages.search import SearchStage
from ftp_lightning.stages.seeds import starting_schedules
from ftp_lightning.stages.showcase import pruner_images
from ftp_lightning.tracking import log_outcome, logging_to


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
    model, tokenizer = load_model(settings, device)
    start = starting_pruner(settings, model)
    first, progress = processes.rank == 0, Progress(**timing)
    budgets = sorted(set(settings.budgets)) or [settings.budget]
    where = settings, model, start.kv
    asked = {budget: settings.in_tokens(token_budget(*where, budget, start.skip_rank) or 0.0) for budget in budgets}
    fitness, text = _fitness(settings, model, tokenizer, start)
    if first:
        what = "windows" if settings.task is None else f"items of {settings.task}"
        progress.say(f"measuring the allocations on {sum(fitness.sizes)} {what}")
    job = "finetune" if settings.pruned else "search"
    logging = logging_to(settings.tracking, folder.place("logs").parent, settings.config(), job) if first else None
    with logging or nullcontext() as logger:
        listener = _Listener(settings, folder, progress, logger) if first else None
        found = _search(asked, start, fitness, listener, state, processes)
        if first:
            _write(settings, folder, model, start, found, text)
            _track(logger, settings, folder, (model, tokenizer), start, found)
    if first:
        progress.done(_conclusion(found))
    return folder.files


def _fitness(settings: SearchStage, model: Any, tokenizer: Any, start: TokenPruner) -> tuple[MemoFitness, dict]:
    """What is minimised, and the hash of what it is measured on."""
    if settings.task is not None:
        from ftp_lightning.search.accuracy import TaskAccuracy, task_items
        from ftp_lightning.stages.task_files import local_file

        items = task_items(settings.task, local_file(settings.task, settings.task_data), settings.windows)
        fitness = TaskAccuracy(model, tokenizer, items, start.with_schedule, settings.chunk, settings.batch_size)
        return fitness, {"items": fitness.identity()["items"]}
    windows = mixed_windows(settings, tokenizer, settings.windows, settings.recall_share)
    criterion = CRITERIA[settings.criterion]()
    on_text = ContinuationFitness(model, windows, start.with_schedule, settings.chunk, criterion)
    return on_text, {"windows": windows.hash()}


def starting_pruner(settings: SearchStage, model: Any) -> TokenPruner:
    """The pruner whose schedule is searched; a new one is dense until it is given one."""
    if not settings.pruned:
        dense = Schedule.uniform(num_blocks(model), 0.0)
        router = make_router(settings.router, dense.num_blocks, hidden_size=1, seed=settings.seed)  # none reads states
        return TokenPruner(router, dense, kv="keep" if settings.kv == "auto" else settings.kv)
    trained = load_pruner(settings.pruned, model)
    changes = {} if settings.kv == "auto" else {"kv": settings.kv}
    return trained.changed(**changes)


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
        self.progress.step(step, self.searches * (total + 1), what)

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
) -> dict[float, SearchResult]:
    """Budget as it was asked for -> what was found; asked: the settings of each, told in tokens."""
    if state is not None and listener is not None:
        listener.going_on(state)
    blocks, (first, *others) = start.scheduled.num_blocks, asked.values()
    seeds = {one.budget: starting_schedules(one, start, fitness) for one in asked.values()}
    own = first.search_settings()
    if not others:
        found = {first.budget: genetic_search(fitness, blocks, own, seeds[first.budget], listener, state, processes)}
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

    def metrics(result: SearchResult) -> dict[str, Any]:
        numbers = {"value": result.value, "allocations": result.allocations, "generations": result.generations}
        if settings.budget_kind == "flops":
            cut = flops_reduction(model, result.schedule, settings.budget_length, start.kv, rank=start.skip_rank)
            numbers["flops_reduction"] = cut
        return numbers | {"stopped": result.stopped}

    if settings.budgets:
        ScheduleFamily([result.schedule for result in found.values()]).save(folder.place("schedules.json"))
        folder.write_json("metrics.json", {"budgets": {str(b): metrics(one) for b, one in found.items()}} | more)
        return
    (result,) = found.values()
    result.schedule.save(folder.place("schedule.json"))
    if settings.writes_pruner:
        start.with_schedule(result.schedule).save(folder.place("pruned"), base=settings.model, model=model)
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
