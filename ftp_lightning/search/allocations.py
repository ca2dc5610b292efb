"""Ways to spread a budget over the blocks: baselines, and the seeds of the genetic population.

Every function is pure and returns a Schedule whose mean is the budget B to 1e-9, with entries in [0, ceiling]. A
budget that does not fit the bounds is a UserError.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from ftp_lightning.errors import UserError
from ftp_lightning.schedule import Schedule, level_step
from ftp_lightning.search.operators import to_schedule, top_level


def project(values: Sequence[float], budget: float, lower: float = 0.0, upper: float = 1.0) -> Schedule:
    """The schedule nearest `values` (Euclidean) with mean B and entries in [lower, upper].

    s = clip(values + t, lower, upper), t by bisection, to 12 digits: a block that ends at 0 is exactly dense.
    ValueError for values that are not finite.
    """
    if not lower <= budget <= upper:
        raise UserError(f"a budget of {budget} does not fit blocks of sparsity {lower} to {upper}")
    values = _finite("values", values)
    low, high = lower - values.max(), upper - values.min()
    for _ in range(100):
        shift = (low + high) / 2
        low, high = (shift, high) if np.clip(values + shift, lower, upper).mean() < budget else (low, shift)
    return Schedule(np.clip(np.round(values + (low + high) / 2, 12), lower, upper).tolist())


def uniform(num_blocks: int, budget: float) -> Schedule:
    """The same sparsity in every block [the paper's uniform baseline]."""
    return Schedule.uniform(num_blocks, budget)


def random_allocation(num_blocks: int, budget: float, rng: random.Random, ceiling: float = 1.0) -> Schedule:
    """Independent uniform draws from [0, ceiling], projected on the budget."""
    return project([rng.uniform(0.0, ceiling) for _ in range(num_blocks)], budget, upper=ceiling)


def ramp(num_blocks: int, budget: float, ceiling: float = 1.0) -> Schedule:
    """Rising linearly with depth from 0: s_l = 2 B l / (N - 1); what the ceiling cuts off lifts the others [ours]."""
    return project([2 * budget * block / max(1, num_blocks - 1) for block in range(num_blocks)], budget, upper=ceiling)


def step(num_blocks: int, budget: float, first: int = 1, ceiling: float = 1.0) -> Schedule:
    """The first `first` blocks dense, the others equal; beyond their ceiling the first blocks share the rest [ours]."""
    if not 0 <= first < num_blocks:
        raise ValueError(f"first is {first}, must be in [0, {num_blocks - 1}]")
    rest = budget * num_blocks / (num_blocks - first)
    return project([0.0] * first + [rest] * (num_blocks - first), budget, upper=ceiling)


def late(num_blocks: int, budget: float, ceiling: float = 1.0) -> Schedule:
    """`ceiling` from the last block on until the budget is spent; one block carries the remainder [ours, lead 0]."""
    if budget > ceiling:
        raise UserError(f"a budget of {budget} does not fit blocks of sparsity 0.0 to {ceiling}")
    left, sparsity = num_blocks * budget, []
    for _ in range(num_blocks):
        sparsity.append(min(ceiling, left))
        left = round(left - sparsity[-1], 12)  # so that the rest of the blocks is exactly dense
    return Schedule(sparsity[::-1])


def from_importance(importance: Sequence[float], budget: float, ceiling: float = 1.0) -> Schedule:
    """High importance, low sparsity: s_l ~ w_l = (max I - I_l) / (max I - min I), mean B, projected [ours].

    `importance` (N,): Block Influence (ShortGPT: 1 - cos(in, out)) or a single-block KL. Equal importance gives the
    uniform one.
    """
    importance = _finite("importance", importance)
    spread = importance.max() - importance.min()
    weight = (importance.max() - importance) / spread if spread > 0 else np.ones_like(importance)
    return project(weight * (budget / weight.mean()), budget, upper=ceiling)


def knapsack(
    costs: Sequence[Sequence[float]],
    levels: Sequence[float],
    budget: float,
    resolution: float = 0.05,
    ceiling: float = 1.0,
) -> Schedule:
    """The schedule of least summed single-block cost, exactly, on a grid of sparsities [ours].

    costs: (N, L), the KL when block n alone is pruned at sparsity `levels[l]` (ascending, > 0); dense costs 0,
    between measured levels it is linear, beyond the last nothing is known and nothing is pruned, nor beyond `ceiling`.
    The grid's step divides N * B (`level_step`), so that min sum_n cost_n(g_n) over integers g with sum g = N B / step
    is a dynamic programme over blocks and partial sums.
    """
    costs = _finite("costs", costs)
    if costs.ndim != 2 or costs.shape[1] != len(levels):
        raise ValueError(f"costs must be (blocks, {len(levels)}), got {costs.shape}")
    if list(levels) != sorted({*levels}) or levels[0] <= 0:
        raise ValueError(f"levels must rise and be > 0, got {list(levels)}")
    if budget > levels[-1]:
        raise UserError(
            f"a budget of {budget} is beyond the highest measured sparsity {levels[-1]}\nMeasure a higher level."
        )
    ceiling = min(levels[-1], ceiling)
    size = level_step(len(costs), budget, resolution)
    total = round(len(costs) * budget / size)
    grid = np.minimum(np.arange(min(top_level(size, ceiling), total) + 1) * size, ceiling)
    fine = np.array([np.interp(grid, [0.0, *levels], [0.0, *row]) for row in costs])
    return to_schedule(cheapest_levels(fine, total), size, ceiling)


def cheapest_levels(costs: np.ndarray, total: int) -> list[int]:
    """argmin over integers g_n in [0, G] with sum g = total of sum_n costs[n, g_n]; costs (N, G + 1), O(N total G)."""
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


def _finite(name: str, values) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got {values.tolist()}")
    return values
