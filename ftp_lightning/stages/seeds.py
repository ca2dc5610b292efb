"""What a search starts from."""

from __future__ import annotations

from ftp_lightning.pruning import TokenPruner
from ftp_lightning.schedule import Schedule
from ftp_lightning.search import allocations as spread
from ftp_lightning.stages.inputs import check_blocks, load_sensitivity
from ftp_lightning.stages.search import SearchStage


def starting_schedules(settings: SearchStage, start: TokenPruner) -> dict[str, Schedule]:
    """Schedules to start the search from, by name, all of the budget: allocations, and those the user gave."""
    blocks = start.schedule.num_blocks
    measured = load_sensitivity(settings.sensitivity, blocks) if settings.sensitivity else None
    given = {"start": start.schedule} if settings.pruned else {}
    if settings.schedule:
        given["given"] = Schedule.load(settings.schedule)
        check_blocks(given["given"], settings.schedule, blocks)
    fit = {
        name: spread.project(seed.sparsity, settings.budget, upper=settings.max_sparsity)
        for name, seed in given.items()
    }
    return allocations(blocks, settings.budget, settings.max_sparsity, measured) | fit


def allocations(num_blocks: int, budget: float, ceiling: float, measured: dict | None) -> dict[str, Schedule]:
    """Closed-form allocations of a budget; with what `sensitivity` measured also the two that need it."""
    found = {
        "uniform": spread.uniform(num_blocks, budget),
        "ramp": spread.ramp(num_blocks, budget, ceiling),
        "late": spread.late(num_blocks, budget, ceiling),
    }
    if num_blocks > 1:
        found["first dense"] = spread.step(num_blocks, budget, ceiling=ceiling)
    if measured:
        found["block influence"] = spread.from_importance(measured["block_influence"], budget, ceiling)
    if measured and budget <= measured["levels"][-1]:
        found["sensitivity"] = spread.knapsack(measured["kl"], measured["levels"], budget, ceiling=ceiling)
    return found
