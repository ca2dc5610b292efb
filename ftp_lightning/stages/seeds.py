"""What a search starts from."""

from __future__ import annotations

from ftp_lightning.pruning import TokenPruner
from ftp_lightning.schedule import Schedule
from ftp_lightning.search.allocate import AllocationRequest, seed_allocations
from ftp_lightning.search.allocations import project
from ftp_lightning.stages.inputs import check_blocks, load_sensitivity
from ftp_lightning.stages.search import SearchStage


def starting_schedules(settings: SearchStage, start: TokenPruner) -> dict[str, Schedule]:
    """Schedules to start the search from, by name, all of the budget: allocations, and those the user gave."""
    blocks = start.schedule.num_blocks
    request = AllocationRequest(
        num_blocks=blocks,
        budget=settings.budget,
        upper=settings.max_sparsity,
        sensitivity=load_sensitivity(settings.sensitivity, blocks) if settings.sensitivity else None,
        kv=start.kv,
        seed=settings.seed,
    )
    given = {"start": start.schedule} if settings.pruned else {}
    if settings.schedule:
        given["given"] = Schedule.load(settings.schedule)
        check_blocks(given["given"], settings.schedule, blocks)
    fit = {name: project(seed.sparsity, settings.budget, upper=settings.max_sparsity) for name, seed in given.items()}
    return {name.replace("_", " "): seed for name, seed in seed_allocations(request).items()} | fit
