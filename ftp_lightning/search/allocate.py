"""Every allocation by name, behind one request: `allocate("ramp", AllocationRequest(num_blocks=12, budget=0.3))`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftp_lightning.errors import UserError
from ftp_lightning.schedule import Schedule
from ftp_lightning.search import allocations as spread
from ftp_lightning.search.allocations import block_bounds
from ftp_lightning.search.operators import PerBlock


@dataclass(frozen=True, kw_only=True)
class AllocationRequest:
    """What an allocation is made for, and what it may look at. UserError where budget and bounds do not fit.

    Args:
        num_blocks: N.
        budget: mean sparsity B over the blocks, in [0, 1); met to 1e-9.
        lower, upper: least and highest sparsity of a block: one number for all, or N numbers.
        sensitivity: what stage `sensitivity` has written, parsed.
        kv: the kv mode in force, or one per block: which of several measured KLs is looked at (None = the first), and
            for which modes `default` is made (None = those of `Schedule.default`).
        seed: of the random allocation.
        measure: Schedule -> loss, for the greedy one.
        resolution: difference of two sparsities, where an allocation goes by levels.
        dense: how many blocks `step`, `first_dense`, `last_dense` and `ends_dense` leave dense; None = half of them for
            `step`, one (at each end) for the others.
    """

    num_blocks: int
    budget: float
    lower: PerBlock = 0.0
    upper: PerBlock = 1.0
    sensitivity: dict[str, Any] | None = None
    kv: str | Sequence[str] | None = None
    seed: int = 0
    measure: Callable[[Schedule], float] | None = None
    resolution: float = 0.05
    dense: int | None = None

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise UserError(f"num_blocks is {self.num_blocks}, must be at least 1")
        if not 0.0 <= self.budget < 1.0:
            raise UserError(f"budget is {self.budget}, must be in [0, 1)")
        block_bounds(self.num_blocks, self.budget, self.lower, self.upper)
        measured = len(self.sensitivity["block_influence"]) if self.sensitivity else self.num_blocks
        if measured != self.num_blocks:
            raise UserError(f"the sensitivity was measured on {measured} blocks, {self.num_blocks} are asked for")

    @property
    def measured(self) -> dict[str, Any]:
        """The sensitivity, where it is known to be there."""
        assert self.sensitivity is not None
        return self.sensitivity

    @property
    def bounds(self) -> dict[str, PerBlock]:
        return {"lower": self.lower, "upper": self.upper}

    @property
    def kl(self) -> list[list[float]]:
        """(N, levels): KL of each block pruned alone in its kv mode; where that was not measured, in the first one."""
        by_kv, first = self.measured.get("kl_by_kv", {}), self.measured["kl"]
        modes = [self.kv] * self.num_blocks if isinstance(self.kv, str | None) else self.kv
        return [by_kv.get(kv, first)[block] for block, kv in enumerate(modes)]


@dataclass(frozen=True)
class Allocation:
    """One way to spread a budget: `allocation(request) -> Schedule`.

    Args:
        make: the Schedule of a request that holds what is needed.
        missing: what a request lacks, in a sentence with its remedy; None where it lacks nothing.
        seeds: whether a search starts from it without being asked to.
    """

    make: Callable[[AllocationRequest], Schedule]
    missing: Callable[[AllocationRequest], str | None] = lambda request: None
    seeds: bool = False

    def __call__(self, request: AllocationRequest) -> Schedule:
        """UserError where the request lacks something."""
        if problem := self.missing(request):
            raise UserError(problem)
        return self.make(request)


def allocate(name: str, request: AllocationRequest) -> Schedule:
    """The allocation of that name (a key of `ALLOCATIONS`), its mean the budget to 1e-9, its entries in the bounds.

    UserError for an unknown name, for what the request lacks, and where nothing fits.
    """
    if name not in ALLOCATIONS:
        raise UserError(f"there is no allocation {name!r}\nAllocations: {', '.join(ALLOCATIONS)}.")
    try:
        return ALLOCATIONS[name](request)
    except UserError as error:
        raise UserError(f"allocation {name}: {error}") from None


def seed_allocations(request: AllocationRequest, names: Sequence[str] | None = None) -> dict[str, Schedule]:
    """Schedules to start a search from, by name. names: those wanted, UserError where one lacks something; None = all
    that usually are, without those that lack something."""
    if names is not None:
        return {name: allocate(name, request) for name in names}
    usual = {name: each for name, each in ALLOCATIONS.items() if each.seeds and not each.missing(request)}
    return {name: each(request) for name, each in usual.items()}


MEASURE = "Give --sensitivity FILE, as `ftp-lightning sensitivity` writes it."


def _needs(*keys: str) -> Callable[[AllocationRequest], str | None]:
    """Lacks: a measured sensitivity with these columns."""

    def missing(request: AllocationRequest) -> str | None:
        if not request.sensitivity:
            return f"it needs what `sensitivity` measures\n{MEASURE}"
        absent = [key for key in keys if key not in request.sensitivity]
        return f"it needs the {absent[0]}, which was not measured\n{MEASURE}" if absent else None

    return missing


def _needs_levels(request: AllocationRequest) -> str | None:
    """Lacks: KLs up to a sparsity that the budget can be spread below."""
    if problem := _needs("kl", "levels")(request):
        return problem
    highest = request.measured["levels"][-1]
    floor, ceiling = block_bounds(request.num_blocks, request.budget, request.lower, request.upper)
    return spread.beyond_measured(request.budget, spread.measured_ceiling(floor, ceiling, highest), highest)


def _needs_measure(request: AllocationRequest) -> str | None:
    return None if request.measure else "it needs a loss to measure schedules with\nGive the request `measure`."


def _dense_ends(first: bool, last: bool, half: bool = False, seeds: bool = False) -> Allocation:
    """Blocks at the first end, the last, or both, are dense."""

    def count(r: AllocationRequest) -> int:
        return r.dense if r.dense is not None else r.num_blocks // 2 if half else 1

    def missing(r: AllocationRequest) -> str | None:
        dense = count(r) * (first + last)
        if 0 <= dense < r.num_blocks:
            return None
        return f"{dense} dense blocks of {r.num_blocks} leave none to prune\nGive the request fewer `dense`."

    def make(r: AllocationRequest) -> Schedule:
        return spread.step(r.num_blocks, r.budget, first * count(r), last * count(r), **r.bounds)

    return Allocation(make, missing, seeds)


def _uniform(r: AllocationRequest) -> Schedule:
    return spread.uniform(r.num_blocks, r.budget, **r.bounds)


def _random(r: AllocationRequest) -> Schedule:
    return spread.random_allocation(r.num_blocks, r.budget, random.Random(r.seed), **r.bounds)


def _ramp(r: AllocationRequest) -> Schedule:
    return spread.ramp(r.num_blocks, r.budget, **r.bounds)


def _late(r: AllocationRequest) -> Schedule:
    return spread.late(r.num_blocks, r.budget, **r.bounds)


def _default(r: AllocationRequest) -> Schedule:
    kv = _default_modes(r)
    return spread.project(Schedule.default(r.num_blocks, r.budget, kv).sparsity, r.budget, **r.bounds)


def _default_modes(r: AllocationRequest) -> str | None:
    """The modes in force as `Schedule.default` takes them: one for all blocks, or None for those of its own."""
    modes = {r.kv} if isinstance(r.kv, str | None) else set(r.kv)
    return modes.pop() if len(modes) == 1 else None


def _needs_default_modes(r: AllocationRequest) -> str | None:
    if r.kv is None or _default_modes(r) or tuple(r.kv) == Schedule.default(r.num_blocks, r.budget).kv:
        return None
    return "there is no default schedule for these kv modes\nLeave it out, or give --kv."


def _block_influence(r: AllocationRequest) -> Schedule:
    return spread.from_importance(r.measured["block_influence"], r.budget, **r.bounds)


def _gradient(r: AllocationRequest) -> Schedule:
    return spread.from_importance(r.measured["gradient"], r.budget, **r.bounds)


def _sensitivity(r: AllocationRequest) -> Schedule:
    return spread.knapsack(r.kl, r.measured["levels"], r.budget, r.resolution, **r.bounds)


def _greedy(r: AllocationRequest) -> Schedule:
    assert r.measure is not None  # `_needs_measure`
    return spread.greedy(r.num_blocks, r.budget, r.measure, r.resolution, **r.bounds)


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Allocation(_uniform, seeds=True),
    "random": Allocation(_random),
    "ramp": Allocation(_ramp, seeds=True),
    "step": _dense_ends(first=True, last=False, half=True),
    "late": Allocation(_late, seeds=True),
    "first_dense": _dense_ends(first=True, last=False, seeds=True),
    "last_dense": _dense_ends(first=False, last=True),
    "ends_dense": _dense_ends(first=True, last=True),
    "default": Allocation(_default, _needs_default_modes, seeds=True),
    "block_influence": Allocation(_block_influence, _needs("block_influence"), seeds=True),
    "gradient": Allocation(_gradient, _needs("gradient"), seeds=True),
    "sensitivity": Allocation(_sensitivity, _needs_levels, seeds=True),
    "greedy": Allocation(_greedy, _needs_measure),
}
"""All allocations. Not seeds unless asked for: `greedy`, as it costs forwards, and those that others stand for."""
