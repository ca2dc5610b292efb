"""One run, many budgets: the searches of a family of schedules, each warm-started from the one before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from ftp_lightning.schedule import Schedule
from ftp_lightning.search.allocations import project
from ftp_lightning.search.fitness import MemoFitness
from ftp_lightning.search.genetic import SearchResult, genetic_search
from ftp_lightning.search.processes import Processes
from ftp_lightning.search.settings import SearchSettings

NEIGHBOUR = "neighbour"
"""Name of the seed that is the schedule found for the budget before, moved to this one."""


def search_family(
    fitness: MemoFitness,
    num_blocks: int,
    settings: SearchSettings,
    seeds_for: dict[float, dict[str, Schedule]],
    on_generation: Callable[[dict], None] | None = None,
    resume: dict | None = None,
    processes: Processes | None = None,
) -> dict[float, SearchResult]:
    """Search the budgets of `seeds_for` in ascending order; the fitness with its memo is shared.

    Args: as for `genetic_search`; the stop rules hold for each budget, the logged forward_tokens count from the
        beginning of the first. on_generation receives {"done", "current"}.

    Returns: budget -> result.
    """
    done: dict[float, SearchResult] = {}
    current = None
    if resume is not None:
        done = {float(budget): _restored(found) for budget, found in resume["done"].items()}
        current = resume["current"]
    for budget in sorted(seeds_for):
        if budget in done:
            continue

        def tell(state: dict) -> None:
            if on_generation is not None:
                on_generation({"done": {str(b): _recorded(found) for b, found in done.items()}, "current": state})

        seeds = dict(seeds_for[budget])
        if done:
            lower, upper = settings.bounds(num_blocks)
            seeds[NEIGHBOUR] = project(done[max(done)].schedule.sparsity, budget, lower, upper)
        own = replace(settings, budget=budget)
        done[budget] = genetic_search(fitness, num_blocks, own, seeds, tell, current, processes)
        current = None
    return done


def _recorded(found: SearchResult) -> dict[str, Any]:
    return asdict(found) | {"schedule": list(found.schedule.sparsity)}


def _restored(record: dict[str, Any]) -> SearchResult:
    return SearchResult(**record | {"schedule": Schedule(record["schedule"])})
