"""The schedules that a search starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ftp_lightning.pruning import TokenPruner
from ftp_lightning.schedule import Schedule
from ftp_lightning.search.allocate import AllocationRequest, seed_allocations
from ftp_lightning.search.allocations import project
from ftp_lightning.stages.inputs import check_blocks, load_sensitivity, read_schedule

if TYPE_CHECKING:
    from ftp_lightning.stages.search import SearchStage


def starting_schedules(
    settings: SearchStage, start: TokenPruner, measure: Callable[[Schedule], float]
) -> dict[str, Schedule]:
    """Schedules to start the search from, by name, all of the budget: allocations, and those the user gave.

    measure: the loss of a schedule, for allocations that are made by trying.
    """
    blocks = start.scheduled.num_blocks
    lower, upper = settings.search_settings().bounds(blocks)
    request = AllocationRequest(
        num_blocks=blocks,
        budget=settings.budget,
        lower=lower,
        upper=upper,
        sensitivity=load_sensitivity(settings.sensitivity, blocks) if settings.sensitivity else None,
        kv=start.kv,
        seed=settings.seed,
        measure=measure,
        resolution=settings.step,
    )
    given = {"start": start.scheduled} if settings.pruned else {}
    if settings.schedule:
        given["given"] = read_schedule(settings.schedule, settings.budget)
        check_blocks(given["given"], settings.schedule, blocks)
    fit = {name: project(seed.sparsity, settings.budget, lower=lower, upper=upper) for name, seed in given.items()}
    found = seed_allocations(request, settings.allocations or None)
    return {name.replace("_", " "): seed for name, seed in found.items()} | fit
