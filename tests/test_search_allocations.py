"""Every allocation meets its budget within its bounds and says what it says."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftp_lightning.errors import UserError
from ftp_lightning.search import allocations
from ftp_lightning.search.allocations import cheapest_levels, from_importance, knapsack, late, project, ramp, step

KINDS = {
    "uniform": lambda n, b, seed: allocations.uniform(n, b),
    "random": lambda n, b, seed: allocations.random_allocation(n, b, random.Random(seed)),
    "ramp": lambda n, b, seed: ramp(n, b),
    "step": lambda n, b, seed: step(n, b, first=min(2, n - 1)),
    "late": lambda n, b, seed: late(n, b),
    "importance": lambda n, b, seed: from_importance([random.Random(seed + i).random() for i in range(n)], b),
    "knapsack": lambda n, b, seed: knapsack(
        [sorted(random.Random(seed + i).random() for _ in range(3)) for i in range(n)], (0.3, 0.7, 1.0), b
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.just(0.0) | st.floats(1e-6, 0.99), st.integers(0, 1000))
def test_the_mean_is_the_budget(kind, num_blocks, budget, seed):
    schedule = KINDS[kind](num_blocks, budget, seed)
    assert schedule.num_blocks == num_blocks
    assert abs(schedule.budget - budget) <= 1e-9


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=12), st.floats(0.2, 0.7))
def test_a_projection_is_the_nearest_point_of_the_budget_plane(values, budget):
    """KKT: one shift t with s = v + t inside the bounds, s = lower where v + t is below, s = upper where above."""
    lower, upper = 0.2, 0.7
    result = np.array(project(values, budget, lower, upper).sparsity)
    assert result.min() >= lower and result.max() <= upper
    inside = (result > lower + 1e-7) & (result < upper - 1e-7)
    shifts = (result - values)[inside]
    assert np.ptp(shifts) < 1e-6 if inside.any() else True
    if inside.any():
        clipped = np.clip(np.array(values) + shifts[0], lower, upper)
        assert np.abs(clipped - result).max() < 1e-6


def test_a_projection_of_a_point_on_the_plane_stays():
    assert project([0.1, 0.5, 0.6], 0.4).sparsity == pytest.approx((0.1, 0.5, 0.6), abs=1e-12)


def test_the_named_shapes():
    assert ramp(5, 0.3).sparsity == pytest.approx((0, 0.15, 0.3, 0.45, 0.6), abs=1e-9)
    assert step(4, 0.3).sparsity == pytest.approx((0, 0.4, 0.4, 0.4), abs=1e-9)
    assert late(4, 0.3).sparsity == pytest.approx((0, 0, 0.2, 1.0), abs=1e-9)
    assert late(4, 0.3, upper=0.5).sparsity == pytest.approx((0, 0.2, 0.5, 0.5), abs=1e-9)
    assert step(4, 0.9).sparsity == pytest.approx((0.6, 1, 1, 1), abs=1e-9)


@given(st.integers(2, 12), st.floats(0.05, 0.95))
def test_a_ramp_never_falls(num_blocks, budget):
    rises = np.diff(ramp(num_blocks, budget).sparsity)
    assert rises.min() >= -1e-9


def test_the_more_important_block_is_pruned_less():
    schedule = from_importance([0.9, 0.1, 0.5, 0.3], 0.4)
    assert schedule.sparsity[0] == 0.0
    assert np.argsort(schedule.sparsity).tolist() == [0, 2, 3, 1]
    assert schedule.sparsity == pytest.approx((0.0, 0.4 * 4 * 8 / 18, 0.4 * 4 * 4 / 18, 0.4 * 4 * 6 / 18))


@given(st.integers(2, 20), st.floats(0.01, 0.45))
def test_a_block_that_is_not_pruned_is_exactly_dense(num_blocks, budget):
    """A sparsity of 1e-17, left over by rounding, would count as routed."""
    for schedule in (step(num_blocks, budget), ramp(num_blocks, budget), late(num_blocks, budget)):
        assert schedule.sparsity[0] == 0.0


def test_equal_importance_is_uniform():
    assert from_importance([0.2] * 3, 0.4).sparsity == pytest.approx((0.4,) * 3)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
def test_the_knapsack_is_exact(num_blocks, top, seed):
    costs = np.random.default_rng(seed).random((num_blocks, top + 1))
    total = random.Random(seed).randint(0, num_blocks * top)
    best = min(
        (sum(costs[n, g] for n, g in enumerate(levels)), levels)
        for levels in itertools.product(range(top + 1), repeat=num_blocks)
        if sum(levels) == total
    )
    assert tuple(cheapest_levels(costs, total)) == best[1]


def test_the_knapsack_stays_below_the_ceiling():
    schedule = knapsack([[10.0, 30.0], [0.1, 0.2], [9.0, 20.0]], (0.5, 0.9), 0.3, upper=0.4)
    assert schedule.sparsity[1] == 0.4 == max(schedule.sparsity)
    assert schedule.budget == pytest.approx(0.3, abs=1e-9)


def test_the_knapsack_prunes_where_it_is_cheap():
    schedule = knapsack([[10.0, 30.0], [1.0, 1.5], [9.0, 20.0]], (0.5, 0.9), 0.3)
    assert schedule.sparsity == pytest.approx((0, 0.9, 0), abs=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: late(4, 0.6, upper=0.5),
        lambda: ramp(4, 0.6, upper=0.5),
        lambda: knapsack([[1.0]], (0.5,), 0.6),
        lambda: project([0.1], 0.1, lower=0.2),
    ],
)
def test_a_budget_beyond_the_bounds_is_a_user_error(make):
    with pytest.raises(UserError, match="budget of"):
        make()


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        from_importance([0.1, float("nan")], 0.3)
    with pytest.raises(ValueError, match="finite"):
        knapsack([[float("inf")]], (0.5,), 0.3)
