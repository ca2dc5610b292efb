"""The schedules that a search starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ftp_lightning.pruning import TokenPruner
from ftp_lightning.schedule import KV, Schedule
from ftp_lightning.search.allocate import AllocationRequest, seed_allocations
from ftp_lightning.search.allocations import project
from ftp_lightning.stages.inputs import check_blocks, load_sensitivity, read_schedule

if TYPE_CHECKING:
    from ftp_lightning.stages.search import SearchStage


def starting_schedules(
    settings: SearchStage, start: TokenPruner, measure: Callable[[Schedule], float]
) -> dict[str, Schedule]:
    """Schedules to start the search from, by name, all of the budget: allocations, and those the user gave.

    measure: the loss of a schedule, for allocations that are made by trying. With --search_kv every allocation comes
    once in each mode, and that of the sensitivity also with the cheaper mode of every block.
    """
    blocks = start.scheduled.num_blocks
    lower, upper = settings.search_settings().bounds(blocks)
    sensitivity = load_sensitivity(settings.sensitivity, blocks) if settings.sensitivity else None

    def allocated(
        kv: Sequence[str], label: str | None = None, names: Sequence[str] | None = settings.allocations or None
    ) -> dict[str, Schedule]:
        """The allocations for one mode per block, which they say where they have a label."""
        request = AllocationRequest(
            num_blocks=blocks,
            budget=settings.budget,
            lower=lower,
            upper=upper,
            sensitivity=sensitivity,
            kv=kv,
            seed=settings.seed,
            measure=(lambda schedule: measure(schedule.under(kv))) if label else measure,
            resolution=settings.step,
        )
        found = seed_allocations(request, names)
        if label is None:
            return {name.replace("_", " "): seed for name, seed in found.items()}
        return {f"{name.replace('_', ' ')}, {label}": seed.under(kv) for name, seed in found.items()}

    given = {"start": start.scheduled} if settings.pruned else {}
    if settings.schedule:
        given["given"] = read_schedule(settings.schedule, settings.budget)
        check_blocks(given["given"], settings.schedule, blocks)
    fit = {name: project(seed.sparsity, settings.budget, lower=lower, upper=upper) for name, seed in given.items()}
    if not settings.search_kv:
        return allocated(start.kv) | fit
    found = {name: seed for kv in KV for name, seed in allocated([kv] * blocks, kv).items()}
    cheapest = cheapest_modes(sensitivity)
    if cheapest is not None and f"sensitivity, {KV[0]}" in found:
        found |= allocated(cheapest, "mixed", ("sensitivity",))
    return found | {name: seed.under(given[name].kv or start.kv) for name, seed in fit.items()}


def cheapest_modes(sensitivity: dict[str, Any] | None) -> list[str] | None:
    """For each block the kv mode of least KL when it is pruned alone; None where they are all the same, or only one
    was measured."""
    by_kv = {kv: kl for kv, kl in (sensitivity or {}).get("kl_by_kv", {}).items() if kv in KV}
    if len(by_kv) < 2 or sensitivity is None:
        return None
    found = [min(by_kv, key=lambda kv: sum(by_kv[kv][block])) for block in range(len(sensitivity["kl"]))]
    return found if len(set(found)) > 1 else None
