"""One run, many budgets: the searches of a family of schedules, each warm-started from its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from ftp_lightning.processes import Processes
from ftp_lightning.schedule import Schedule
from ftp_lightning.search.allocations import project
from ftp_lightning.search.fitness import MemoFitness
from ftp_lightning.search.genetic import SearchResult, genetic_search
from ftp_lightning.search.settings import SearchSettings

NEIGHBOUR, FOUND = "neighbour", "found"
"""Names of seeds: the schedule of the budget before or above, moved to this one; the one found for this one."""


def search_family(
    fitness: MemoFitness,
    num_blocks: int,
    settings: SearchSettings,
    seeds_for: dict[float, dict[str, Schedule]],
    on_generation: Callable[[dict], None] | None = None,
    resume: dict | None = None,
    processes: Processes | None = None,
) -> dict[float, SearchResult]:
    """Search the budgets of `seeds_for` in ascending order, each started also from the schedule found for the one
    before; then in descending order, again, those for which the schedule of the one above, moved there, is better than
    what was found. The fitness with its memo is shared.

    Args: as for `genetic_search`; the stop rules hold for each search, the logged forward_tokens count from the
        beginning of the first. on_generation receives {"done", "again", "current"}.

    Returns: budget -> result; of one that was searched again, the log of both searches.
    """
    family = _Family(fitness, num_blocks, settings, on_generation, resume or {}, processes or Processes())
    for budget in sorted(seeds_for):
        family.search(budget, seeds_for[budget])
    for budget in sorted(seeds_for, reverse=True)[1:]:
        family.search_again(budget)
    return family.done


class _Family:
    """The budgets done so far, those looked at again, and the state of the search that was interrupted."""

    def __init__(self, fitness, num_blocks, settings, on_generation, resume, processes):
        self.fitness, self.num_blocks, self.settings = fitness, num_blocks, settings
        self.on_generation, self.processes = on_generation, processes
        self.done = {float(budget): _restored(found) for budget, found in resume.get("done", {}).items()}
        self.again: list[float] = list(resume.get("again", []))
        self.current = resume.get("current")

    def search(self, budget: float, seeds: dict[str, Schedule]) -> None:
        if budget not in self.done:
            below = {NEIGHBOUR: self.moved(max(self.done), budget)} if self.done else {}
            self.done[budget] = self.run(budget, seeds | below)

    def search_again(self, budget: float) -> None:
        """Where the schedule of the budget above, moved here, is better."""
        if budget in self.again:
            return
        before, moved = self.done[budget], self.moved(min(b for b in self.done if b > budget), budget)
        if self.fitness.scores([moved], None, self.processes.map)[0] < before.value:
            after = self.run(budget, {FOUND: before.schedule, NEIGHBOUR: moved})
            log = before.generations + after.generations
            self.done[budget] = replace(after, generations=log, allocations=before.allocations)
        self.again.append(budget)

    def moved(self, other: float, budget: float) -> Schedule:
        """What was found for another budget, at this one."""
        lower, upper = self.settings.bounds(self.num_blocks)
        found = self.done[other].schedule
        return project(found.sparsity, budget, lower, upper).under(found.kv)

    def run(self, budget: float, seeds: dict[str, Schedule]) -> SearchResult:
        own, current, self.current = replace(self.settings, budget=budget), self.current, None
        return genetic_search(self.fitness, self.num_blocks, own, seeds, self.tell, current, self.processes)

    def tell(self, state: dict) -> None:
        if self.on_generation is not None:
            done = {str(budget): _recorded(found) for budget, found in self.done.items()}
            self.on_generation({"done": done, "again": list(self.again), "current": state})


def _recorded(found: SearchResult) -> dict[str, Any]:
    return asdict(found) | {"schedule": found.schedule.record()}


def _restored(record: dict[str, Any]) -> SearchResult:
    return SearchResult(**record | {"schedule": Schedule.from_record(record["schedule"])})
