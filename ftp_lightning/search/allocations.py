"""Ways to spread a budget over the blocks: baselines, and the seeds of the genetic population.

Every function is pure and returns a Schedule whose mean is the budget B to 1e-9. `lower` and `upper` bound the sparsity
of the blocks: one number for all, or one per block. Bounds or a budget that do not fit each other are a UserError.
`search.allocate` has all of them by name, behind one request.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence

import numpy as np

from ftp_lightning.errors import UserError
from ftp_lightning.schedule import Schedule, level_step
from ftp_lightning.search.operators import PerBlock, top_level


def block_bounds(
    num_blocks: int, budget: float, lower: PerBlock = 0.0, upper: PerBlock = 1.0
) -> tuple[np.ndarray, ...]:
    """The bounds as two arrays (N,). UserError unless 0 <= lower <= upper <= 1 and mean(lower) <= B <= mean(upper)."""
    bounds = []
    for name, bound in (("lower", lower), ("upper", upper)):
        values = np.asarray(bound, dtype=np.float64)
        if values.shape not in ((), (num_blocks,)):
            raise UserError(f"{name} bounds are {len(values)} numbers, the model has {num_blocks} blocks")
        bounds.append(np.broadcast_to(values, num_blocks))
    low, high = bounds
    if not ((low >= 0) & (low <= high) & (high <= 1)).all():  # also catches NaN
        block = int(np.argmin((low >= 0) & (low <= high) & (high <= 1)))
        raise UserError(
            f"block {block + 1} is bounded by {low[block]:g} and {high[block]:g}\n0 <= lower <= upper <= 1 is needed."
        )
    if not low.mean() - 1e-12 <= budget <= high.mean() + 1e-12:
        raise UserError(
            f"a budget of {budget:g} does not fit blocks of sparsity {_range(low)} to {_range(high)}\n"
            f"These bounds allow {low.mean():.4g} to {high.mean():.4g}."
        )
    return low, high


def project(
    wanted: Sequence[float] | np.ndarray, budget: float, lower: PerBlock = 0.0, upper: PerBlock = 1.0
) -> Schedule:
    """The schedule nearest `wanted` (Euclidean) with mean B and entries in [lower, upper].

    s = clip(wanted + t, lower, upper), t by bisection, to 12 digits: a block that ends at 0 is exactly dense.
    ValueError for values that are not finite.
    """
    values = _finite("values", wanted)
    floor, ceiling = block_bounds(len(values), budget, lower, upper)
    low, high = (floor - values).min(), (ceiling - values).max()
    for _ in range(100):
        shift = (low + high) / 2
        low, high = (shift, high) if np.clip(values + shift, floor, ceiling).mean() < budget else (low, shift)
    return Schedule(np.clip(np.round(values + (low + high) / 2, 12), floor, ceiling).tolist())


def uniform(num_blocks: int, budget: float, lower: PerBlock = 0.0, upper: PerBlock = 1.0) -> Schedule:
    """The same sparsity in every block [the paper's uniform baseline], as far as the bounds let it."""
    floor, ceiling = block_bounds(num_blocks, budget, lower, upper)
    if (floor <= budget).all() and (budget <= ceiling).all():
        return Schedule.uniform(num_blocks, budget)
    return project([budget] * num_blocks, budget, floor, ceiling)


def random_allocation(
    num_blocks: int, budget: float, rng: random.Random, lower: PerBlock = 0.0, upper: PerBlock = 1.0
) -> Schedule:
    """Independent uniform draws between the bounds, projected on the budget."""
    bounds = block_bounds(num_blocks, budget, lower, upper)
    return project([rng.uniform(low, high) for low, high in zip(*bounds)], budget, *bounds)


def ramp(num_blocks: int, budget: float, lower: PerBlock = 0.0, upper: PerBlock = 1.0) -> Schedule:
    """Rising linearly with depth from 0: s_l = 2 B l / (N - 1); what a bound cuts off lifts the others [ours]."""
    values = [2 * budget * block / max(1, num_blocks - 1) for block in range(num_blocks)]
    return project(values, budget, lower, upper)


def step(
    num_blocks: int, budget: float, first: int = 1, last: int = 0, lower: PerBlock = 0.0, upper: PerBlock = 1.0
) -> Schedule:
    """The first `first` and the last `last` blocks dense, the others equal; what these cannot hold all share [ours]."""
    between = num_blocks - first - last
    if min(first, last) < 0 or between < 1:
        raise ValueError(f"{first} first and {last} last blocks of {num_blocks} cannot be dense: one must be left")
    values = [0.0] * first + [budget * num_blocks / between] * between + [0.0] * last
    return project(values, budget, lower, upper)


def late(num_blocks: int, budget: float, lower: PerBlock = 0.0, upper: PerBlock = 1.0) -> Schedule:
    """`upper` from the last block on until the budget is spent, `lower` before; one block carries the remainder [ours,
    lead 0]."""
    floor, ceiling = block_bounds(num_blocks, budget, lower, upper)
    sparsity, left = floor.tolist(), num_blocks * budget - math.fsum(floor)
    for block in reversed(range(num_blocks)):
        more = max(0.0, min(ceiling[block] - floor[block], left))
        sparsity[block] = float(min(floor[block] + more, ceiling[block]))
        left = round(left - more, 12)  # so that the rest of the blocks is exactly dense
    return Schedule(sparsity)


def from_importance(
    importance: Sequence[float], budget: float, lower: PerBlock = 0.0, upper: PerBlock = 1.0
) -> Schedule:
    """High importance, low sparsity: s_l ~ w_l = (max I - I_l) / (max I - min I), mean B, projected [ours].

    `importance` (N,): Block Influence (ShortGPT: 1 - cos(in, out)), a gradient, or a single-block KL. Equal importance
    gives the uniform one.
    """
    found = _finite("importance", importance)
    spread = found.max() - found.min()
    weight = (found.max() - found) / spread if spread > 0 else np.ones_like(found)
    return project(weight * (budget / weight.mean()), budget, lower, upper)


def knapsack(
    costs: Sequence[Sequence[float]],
    levels: Sequence[float],
    budget: float,
    resolution: float = 0.05,
    lower: PerBlock = 0.0,
    upper: PerBlock = 1.0,
) -> Schedule:
    """The schedule of least summed single-block cost, exactly, on a grid of sparsities that starts at `lower` [ours].

    costs: (N, L), the KL when block n alone is pruned at sparsity `levels[l]` (ascending, > 0); dense costs 0,
    between measured levels it is linear, beyond the last nothing is known and nothing is pruned but what `lower` wants.
    The grid's step divides N (B - mean(lower)) (`level_step`), so that min sum_n cost_n(lower_n + g_n step) over
    integers g of the right sum is a dynamic programme over blocks and partial sums. A block's last step may be shorter,
    where its bounds are no multiple of the step; what is cut off there is carried by the blocks that have most room.
    """
    table = _finite("costs", costs)
    if table.ndim != 2 or table.shape[1] != len(levels):
        raise ValueError(f"costs must be (blocks, {len(levels)}), got {table.shape}")
    if list(levels) != sorted({*levels}) or levels[0] <= 0:
        raise ValueError(f"levels must rise and be > 0, got {list(levels)}")
    floor, ceiling = block_bounds(len(costs), budget, lower, upper)
    ceiling = measured_ceiling(floor, ceiling, levels[-1])
    if problem := beyond_measured(budget, ceiling, levels[-1]):
        raise UserError(problem)
    size = level_step(len(costs), max(0.0, round(budget - floor.mean(), 12)), resolution)
    total = round((len(costs) * budget - math.fsum(floor)) / size)
    room = ceiling - floor
    grid = np.arange(min(top_level(size, room.max()), total) + 1) * size
    fine = np.array([_interpolated(row, levels, floor[n] + np.minimum(grid, room[n])) for n, row in enumerate(table)])
    for row, most in zip(fine, room):
        row[top_level(size, most) + 1 :] = np.inf
    found = [min(level * size, most) for level, most in zip(cheapest_levels(fine, total), room)]
    return _carried(floor + np.array(found), budget, floor, ceiling)


def measured_ceiling(floor: np.ndarray, ceiling: np.ndarray, highest: float) -> np.ndarray:
    """Blocks go up to the highest measured sparsity, or to their floor where that is above it."""
    return np.maximum(np.minimum(ceiling, highest), floor)


def beyond_measured(budget: float, ceiling: np.ndarray, highest: float) -> str | None:
    """What to tell where the budget does not fit below `measured_ceiling`; None where it does."""
    if budget <= ceiling.mean() + 1e-12:
        return None
    return f"a budget of {budget:g} is beyond the highest measured sparsity {highest:g}\nMeasure a higher level."


def cheapest_levels(costs: np.ndarray, total: int) -> list[int]:
    """argmin over integers g_n in [0, G] with sum g = total of sum_n costs[n, g_n]; costs (N, G + 1), O(N total G).

    An infinite cost is a level that a block cannot have.
    """
    best = np.full(total + 1, np.inf)
    best[0] = 0.0
    choices = []
    for row in costs:
        options = np.full((len(row), total + 1), np.inf)  # options[g, t]: this block at level g, the sum t so far
        for level, cost in enumerate(row[: total + 1]):
            options[level, level:] = best[: total + 1 - level] + cost
        choices.append(options.argmin(axis=0))
        best = options.min(axis=0)
    levels = []
    for choice in reversed(choices):
        levels.append(int(choice[total]))
        total -= levels[-1]
    return levels[::-1]


def greedy(
    num_blocks: int,
    budget: float,
    measure: Callable[[Schedule], float],
    resolution: float = 0.05,
    lower: PerBlock = 0.0,
    upper: PerBlock = 1.0,
) -> Schedule:
    """From `lower` on, raise by `resolution` the block whose raise adds least loss, until the budget is spent [ours].

    measure: the loss of a schedule, deterministic. Lazy, as Minoux (1978): what a raise added earlier is taken as the
    least it can add now, and only the block at the head of the queue is measured again; the same as measuring all of
    them wherever blocks never get cheaper by others being pruned. About N + 2 N B / resolution measurements. The last
    raise of a block, or of all, may be shorter. Of equal raises the later block's is taken.
    """
    floor, ceiling = block_bounds(num_blocks, budget, lower, upper)
    sparsity, left, raises = floor.tolist(), round(num_blocks * budget - math.fsum(floor), 12), 0
    loss = measure(Schedule(sparsity)) if left > 0 else 0.0
    queue: list[tuple[float, int, int]] = [
        (-math.inf, -block, -1) for block in range(num_blocks) if ceiling[block] - floor[block] > 1e-12
    ]
    while left > 1e-12 * num_blocks and queue:
        added, key, measured_at = heapq.heappop(queue)
        more = min(resolution, ceiling[-key] - sparsity[-key], left)
        raised = _raised(sparsity, -key, more, ceiling)
        if measured_at < raises:  # what it added to an earlier schedule
            heapq.heappush(queue, (measure(Schedule(raised)) - loss, key, raises))
            continue
        sparsity, loss, left, raises = raised, loss + added, round(left - more, 12), raises + 1
        if ceiling[-key] - sparsity[-key] > 1e-12:
            heapq.heappush(queue, (added, key, raises - 1))
    return _carried(np.array(sparsity), budget, floor, ceiling)


def _raised(sparsity: list[float], block: int, more: float, ceiling: np.ndarray) -> list[float]:
    value = float(min(round(sparsity[block] + more, 12), float(ceiling[block])))
    return [value if other == block else s for other, s in enumerate(sparsity)]


def _carried(sparsity: np.ndarray, budget: float, floor: np.ndarray, ceiling: np.ndarray) -> Schedule:
    """What is missing from the budget is put on the block with the lowest sparsity that has room, then on the next."""
    values = np.clip(np.round(sparsity, 12), floor, ceiling).tolist()
    missing = len(values) * budget - math.fsum(values)
    for block in sorted(range(len(values)), key=values.__getitem__):
        if missing <= 1e-10 * len(values):
            break
        share = min(missing, ceiling[block] - values[block])
        values[block] = float(min(values[block] + share, ceiling[block]))
        missing -= share
    return Schedule(values)


def _interpolated(row: np.ndarray, levels: Sequence[float], sparsity: np.ndarray) -> np.ndarray:
    return np.interp(sparsity, [0.0, *levels], [0.0, *row])


def _range(bound: np.ndarray) -> str:
    return f"{bound.min():g}" if bound.min() == bound.max() else f"({bound.min():g} … {bound.max():g})"


def _finite(name: str, values) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got {values.tolist()}")
    return values
