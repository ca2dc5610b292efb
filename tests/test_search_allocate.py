"""Allocations by name: each meets its budget within the bounds of every block, or says what is missing."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftp_lightning.errors import UserError
from ftp_lightning.schedule import Schedule
from ftp_lightning.search.allocate import ALLOCATIONS, AllocationRequest, allocate, seed_allocations
from ftp_lightning.search.allocations import greedy, knapsack, project


def sensitivity(blocks, seed, **changes):
    rng = random.Random(seed)
    kl = {kv: [sorted(rng.random() for _ in range(3)) for _ in range(blocks)] for kv in ("keep", "evict")}
    columns = {name: [rng.random() for _ in range(blocks)] for name in ("block_influence", "gradient")}
    return columns | {"levels": [0.3, 0.7, 1.0], "kl": kl["keep"], "kl_by_kv": kl} | changes


def quadratic(weights):
    return lambda schedule: sum(w * s * s for w, s in zip(weights, schedule.sparsity))


def request(blocks, budget, seed=0, **changes):
    weights = [random.Random(seed + n).random() + 0.1 for n in range(blocks)]
    wanted = {"sensitivity": sensitivity(blocks, seed), "seed": seed, "measure": quadratic(weights)} | changes
    return AllocationRequest(num_blocks=blocks, budget=budget, **wanted)


@pytest.mark.parametrize("name", ALLOCATIONS)
@settings(max_examples=40, deadline=None)
@given(st.integers(3, 12), st.floats(0.0, 1.0), st.integers(0, 10_000))
def test_the_mean_is_the_budget_and_every_block_is_within_its_bounds(name, blocks, place, seed):
    rng = random.Random(seed)
    pairs = [sorted((rng.choice([0.0, rng.random()]), rng.choice([1.0, rng.random()]))) for _ in range(blocks)]
    lower, upper = zip(*pairs)
    budget = min(0.999, np.mean(lower) + place * (np.mean(upper) - np.mean(lower)))
    budget = max(budget, np.mean(lower))
    schedule = allocate(name, request(blocks, budget, seed, lower=lower, upper=upper))
    assert abs(schedule.budget - budget) <= 1e-9
    assert all(low <= s <= high for low, s, high in zip(lower, schedule.sparsity, upper))


def test_bounds_move_an_allocation():
    """Otherwise the test above could pass with bounds that never bind."""
    lower, upper = [0.2, 0, 0, 0], [1, 1, 1, 0.5]
    for name in ("ramp", "late", "first_dense", "sensitivity"):
        free, bound = allocate(name, request(4, 0.4)), allocate(name, request(4, 0.4, lower=lower, upper=upper))
        assert free.sparsity[0] < 0.2 <= bound.sparsity[0] or free.sparsity[3] > 0.5 >= bound.sparsity[3], name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"upper": 0.2}, "does not fit"),
        ({"lower": 0.4}, "does not fit"),
        ({"lower": [0.5, 0, 0], "upper": [0.4, 1, 1]}, "block 1 is bounded by 0.5 and 0.4"),
        ({"lower": [0.0, 0.1]}, "2 numbers"),
        ({"upper": float("nan")}, "bounded by"),
        ({"budget": 1.0}, "budget is 1.0"),
        ({"sensitivity": sensitivity(4, 0)}, "4 blocks"),
    ],
)
def test_what_does_not_fit_is_told_when_it_is_asked_for(changes, told):
    with pytest.raises(UserError, match=told) as refusal:
        AllocationRequest(**({"num_blocks": 3, "budget": 0.3} | changes))
    assert len(str(refusal.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("block_influence", {"sensitivity": None}, "--sensitivity"),
        ("sensitivity", {"sensitivity": None}, "--sensitivity"),
        ("gradient", {"sensitivity": {"block_influence": [1, 2, 3]}}, "gradient, which was not measured"),
        ("sensitivity", {"sensitivity": sensitivity(3, 0, levels=[0.1, 0.2, 0.25])}, "beyond the highest measured"),
        ("greedy", {"measure": None}, "measure"),
        ("ends_dense", {"dense": 2}, "4 dense blocks of 3"),
        ("nonsense", {}, "Allocations: uniform"),
    ],
)
def test_what_is_missing_is_told(name, changes, told):
    with pytest.raises(UserError, match=told) as refusal:
        allocate(name, request(3, 0.3, **changes))
    assert name in str(refusal.value) and len(str(refusal.value).splitlines()) <= 3


def test_a_search_starts_from_what_it_has():
    plain = {"uniform", "ramp", "late", "first_dense", "default"}
    measured = plain | {"block_influence", "gradient", "sensitivity"}
    assert set(seed_allocations(request(3, 0.3, sensitivity=None))) == plain
    assert set(seed_allocations(request(3, 0.3))) == measured
    low = sensitivity(3, 0, levels=[0.1, 0.2, 0.25])
    assert set(seed_allocations(request(3, 0.3, sensitivity=low))) == measured - {"sensitivity"}
    assert set(seed_allocations(request(1, 0.3, sensitivity=None))) == plain - {"first_dense"}
    assert set(seed_allocations(request(3, 0.3), ("greedy", "random"))) == {"greedy", "random"}


@pytest.mark.parametrize("kv", ["keep", "evict"])
def test_a_search_starts_from_the_default_schedule_of_its_mode(kv):
    found = seed_allocations(request(8, 0.3, sensitivity=None, kv=kv))["default"]
    assert found.sparsity == pytest.approx(Schedule.default(8, 0.3, kv).sparsity) and found.kv is None


def test_the_default_schedule_holds_for_its_own_modes_alone():
    own = Schedule.default(8, 0.3)
    mixed = request(8, 0.3, sensitivity=None, kv=own.kv)
    assert allocate("default", mixed).sparsity == pytest.approx(own.sparsity)
    assert allocate("default", request(8, 0.3, kv=["keep"] * 8)).sparsity == pytest.approx(
        Schedule.default(8, 0.3, "keep").sparsity
    )
    other = request(8, 0.3, sensitivity=None, kv=own.kv[::-1])
    assert "default" not in seed_allocations(other)
    with pytest.raises(UserError, match="no default schedule for these kv modes"):
        allocate("default", other)


def test_the_dense_ends():
    def shape(name, **changes):
        return allocate(name, request(6, 0.2, **changes)).sparsity

    assert shape("step") == pytest.approx((0, 0, 0, 0.4, 0.4, 0.4))
    assert shape("first_dense", dense=2) == pytest.approx((0, 0, 0.3, 0.3, 0.3, 0.3))
    assert shape("last_dense") == pytest.approx((*[0.24] * 5, 0))
    assert shape("ends_dense") == pytest.approx((0, 0.3, 0.3, 0.3, 0.3, 0))


def test_the_random_one_follows_its_seed():
    first, again, other = (allocate("random", request(5, 0.4, seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_the_kv_mode_decides_which_cost_is_looked_at():
    low, high = [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]
    by_kv = {"keep": [low, high], "evict": [high, low]}
    found = sensitivity(2, 0, kl=by_kv["keep"], kl_by_kv=by_kv)

    def pruned(kv):
        return allocate("sensitivity", request(2, 0.5, sensitivity=found, kv=kv)).sparsity

    assert pruned(None) == pruned("keep") == pruned(["keep", "keep"]) == (1.0, 0.0)
    assert pruned("evict") == (0.0, 1.0)
    assert request(2, 0.5, sensitivity=found, kv=["keep", "evict"]).kl == [low, low]
    del found["kl_by_kv"]  # a file of an earlier version
    assert pruned("evict") == (1.0, 0.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 8), st.integers(0, 1000))
def test_greedy_is_lazy_and_takes_the_cheapest_raise(blocks, raises, seed):
    """Convex, separable costs: greedy by equal raises is optimal, so it is the knapsack on the same grid."""
    rng = random.Random(seed)
    weights = [rng.random() + 0.1 for _ in range(blocks)]
    budget, levels, asked = raises / 10 / blocks, [n / 10 for n in range(1, 11)], []

    def measure(schedule):
        asked.append(schedule)
        return quadratic(weights)(schedule)

    found = greedy(blocks, budget, measure, resolution=0.1)
    best = knapsack([[w * s * s for s in levels] for w in weights], levels, budget, resolution=0.1)
    assert quadratic(weights)(found) == pytest.approx(quadratic(weights)(best))
    assert len(asked) <= 1 + blocks + 2 * raises


def test_greedy_sees_what_blocks_cost_together():
    """Alone both are cheap, together dear: the second raise goes elsewhere."""

    def measure(schedule):
        a, b, c = schedule.sparsity
        return 0.1 * a + 0.11 * b + 0.3 * c + 10 * a * b

    assert greedy(3, 0.4, measure, resolution=0.6, upper=0.6).sparsity == pytest.approx((0.6, 0.0, 0.6))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=2, max_size=8), st.floats(0, 1), st.integers(0, 1000))
def test_a_projection_within_bounds_per_block_is_one_shift(values, place, seed):
    rng = random.Random(seed)
    lower, upper = map(np.array, zip(*(sorted((rng.random(), rng.random())) for _ in values)))
    budget = lower.mean() + place * (upper.mean() - lower.mean())
    result = np.array(project(values, budget, lower, upper).sparsity)
    inside = (result > lower + 1e-6) & (result < upper - 1e-6)
    if inside.any():
        shift = (result - values)[inside][0]
        assert np.abs(np.clip(np.array(values) + shift, lower, upper) - result).max() < 1e-6
    assert abs(result.mean() - budget) < 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 4), st.integers(0, 1000))
def test_the_knapsack_is_exact_within_bounds_per_block(blocks, seed):
    rng = random.Random(seed)
    levels = [n / 10 for n in range(1, 11)]
    costs = [sorted(rng.random() for _ in levels) for _ in range(blocks)]
    bounds = [sorted((rng.randint(0, 4), rng.randint(5, 10))) for _ in range(blocks)]
    total = rng.randint(sum(low for low, _ in bounds), min(10 * blocks - 1, sum(high for _, high in bounds)))
    lower, upper = ([value / 10 for value in side] for side in zip(*bounds))
    found = knapsack(costs, levels, total / 10 / blocks, 0.1, lower, upper).sparsity

    def cost(grid):
        return sum(row[g - 1] if g else 0.0 for row, g in zip(costs, grid))

    grids = itertools.product(*(range(low, high + 1) for low, high in bounds))
    best = min(cost(grid) for grid in grids if sum(grid) == total)
    assert cost([round(10 * s) for s in found]) == pytest.approx(best)
