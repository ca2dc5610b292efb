"""Levels and the operators on them: the sum never moves, bounds hold, nothing is changed in place."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftp_lightning.schedule import Schedule, level_step
from ftp_lightning.search import operators
from ftp_lightning.search.operators import (
    Individual,
    budget_crossover,
    crossover_with_modes,
    level_switch,
    mode_flip,
    split,
    switch_with_modes,
    to_levels,
    to_schedule,
    top_level,
    tournament,
)

seeds = st.integers(0, 2**32)
populations = st.integers(1, 12).flatmap(
    lambda n: st.tuples(st.lists(st.integers(0, 20), min_size=n, max_size=n), st.integers(0, 2**32))
)


@given(populations, st.integers(1, 4))
def test_a_switch_keeps_sum_and_bounds_and_leaves_its_parent_alone(population, switches):
    levels, seed = population
    before = list(levels)
    child = level_switch(levels, random.Random(seed), max_level=20, switches=switches)
    assert levels == before
    assert sum(child) == sum(levels) and len(child) == len(levels)
    assert all(0 <= level <= 20 for level in child)
    assert sum(a != b for a, b in zip(child, levels)) <= 2 * switches


@given(seeds)
def test_one_switch_moves_two_blocks_by_the_same_amount(seed):
    child = level_switch([5, 5, 5, 5], random.Random(seed), max_level=10, switches=1)
    moves = sorted(b - a for a, b in zip([5, 5, 5, 5], child) if a != b)
    assert len(moves) == 2 and moves[0] == -moves[1] and moves[1] in (1, 2, 4, 5)


@pytest.mark.parametrize("levels", [[0, 0], [3, 3], [2]])
def test_where_nothing_can_move_the_child_is_the_parent(levels):
    assert level_switch(levels, random.Random(0), max_level=3, switches=2) == levels


@given(populations, seeds)
def test_a_crossover_lies_between_its_parents_and_keeps_their_sum(population, seed):
    a, shuffle_seed = population
    b = random.Random(shuffle_seed).sample(a, len(a))
    child = budget_crossover(a, b, random.Random(seed))
    assert sum(child) == sum(a)
    assert all(min(x, y) <= c <= max(x, y) for x, y, c in zip(a, b, child))


def test_parents_of_different_budgets_are_refused():
    with pytest.raises(ValueError, match="level sums 3 and 4"):
        budget_crossover([1, 2], [2, 2], random.Random(0))


def test_a_crossover_mixes():
    children = {tuple(budget_crossover([0, 4, 0, 4], [4, 0, 4, 0], random.Random(seed))) for seed in range(50)}
    assert len(children) > 5


@given(st.lists(st.floats(0, 1), min_size=1, max_size=16), st.floats(0.02, 0.3))
def test_levels_sum_to_the_rounded_total_and_lie_within_one_of_the_schedule(values, step):
    top = top_level(step)
    levels = to_levels(Schedule(values), step, top)
    assert sum(levels) == round(sum(v / step for v in values))
    assert all(abs(level - v / step) <= 1 + 1e-9 for level, v in zip(levels, values))
    assert max(levels) <= top


def test_levels_take_the_largest_remainders_first():
    assert to_levels(Schedule([0.13, 0.18, 0.19]), 0.1, 10) == [1, 2, 2]
    assert to_levels(Schedule([0.16, 0.11, 0.13]), 0.1, 10) == [2, 1, 1]


def test_levels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not fit"):
        to_levels(Schedule([0.5, 0.5]), 0.1, 4)


@given(st.integers(1, 24), st.floats(0.01, 0.98), st.floats(0.02, 0.3), st.floats(0.0, 0.02), seeds)
def test_the_budget_survives_levels_under_any_ceiling(num_blocks, budget, requested, slack, seed):
    """|mean - B| <= 1e-9 also where the step does not divide the ceiling: a block carries what is cut off."""
    ceiling = min(1.0, budget + slack + random.Random(seed).random() * (1 - budget))
    step = level_step(num_blocks, budget, requested)
    top = top_level(step, ceiling)
    levels = to_levels(Schedule.uniform(num_blocks, budget), step, top)
    for _ in range(20):
        levels = level_switch(levels, random.Random(seed), top, 3)
    schedule = to_schedule(levels, step, ceiling)
    assert abs(schedule.budget - budget) <= 1e-9
    assert max(schedule.sparsity) <= ceiling


def test_one_block_carries_what_the_bound_cuts_off():
    assert to_schedule([3, 0, 1], 0.4).sparsity == pytest.approx((1.0, 0.2, 0.4))
    assert to_schedule([6, 0], 0.05).sparsity == (0.3, 0.0)


def test_there_must_be_room_for_it():
    with pytest.raises(ValueError, match="does not fit below"):
        to_schedule([3, 3], 0.4)


def test_the_lower_loss_is_the_fitter():
    a, b = Individual([1]), Individual([2])
    a.fitness.values, b.fitness.values = (0.1,), (0.2,)
    assert a.fitness > b.fitness and a.loss == 0.1


@given(st.integers(1, 12), st.floats(0.05, 0.3), seeds)
def test_bounds_of_each_block_hold_and_the_sum_stays(num_blocks, step, seed):
    rng = random.Random(seed)
    lower = [rng.choice([0.0, 0.1, 0.35]) for _ in range(num_blocks)]
    upper = [low + rng.uniform(0.0, 1.0 - low) for low in lower]
    room = sum(upper) - sum(lower)
    tops = [top_level(step, high, low) for low, high in zip(lower, upper)]
    total = min(sum(tops), int(rng.random() * room / step))
    levels = [0] * num_blocks
    for _ in range(total):
        open_blocks = [block for block in range(num_blocks) if levels[block] < tops[block]]
        levels[rng.choice(open_blocks)] += 1
    for _ in range(10):
        levels = level_switch(levels, rng, tops, 3)
    schedule = to_schedule(levels, step, upper, lower)
    assert sum(levels) == total and abs(sum(schedule.sparsity) - sum(lower) - step * total) <= 1e-8
    assert all(low - 1e-9 <= s <= high + 1e-9 for low, s, high in zip(lower, schedule.sparsity, upper))
    again = to_levels(schedule, step, tops, lower)
    assert sum(again) == total


def test_bounds_of_another_number_of_blocks_are_refused():
    with pytest.raises(ValueError, match="2 values were given for 3 blocks"):
        to_schedule([1, 1, 1], 0.1, (1.0, 1.0))


def test_a_tournament_takes_the_best_of_those_drawn():
    population = [Individual([n]) for n in range(10)]
    for loss, individual in enumerate(population):
        individual.fitness.values = (float(loss),)
    picks = [tournament(population, random.Random(seed), 4).loss for seed in range(200)]
    assert sum(picks) / 200 < 2.5 and max(picks) > 3
    assert {tournament(population, random.Random(seed), 1).loss for seed in range(99)} == set(range(10))


@given(st.lists(st.integers(0, 1), min_size=1, max_size=12), seeds, st.integers(1, 4))
def test_a_flip_changes_at_least_one_mode_and_at_most_so_many(modes, seed, flips):
    before = list(modes)
    changed = mode_flip(modes, random.Random(seed), flips)
    assert modes == before and set(changed) <= {0, 1}
    assert 1 <= sum(a != b for a, b in zip(changed, modes, strict=True)) <= flips


genes = st.integers(1, 10).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 20), min_size=n, max_size=n),
        st.lists(st.integers(0, 1), min_size=2 * n, max_size=2 * n),
    )
)


@given(genes, seeds)
def test_a_mutation_with_modes_keeps_the_sum_of_the_levels(parent, seed):
    levels, modes = parent[0], parent[1][: len(parent[0])]
    child, after = split(switch_with_modes([*levels, *modes], random.Random(seed), 20, 2), len(levels))
    assert sum(child) == sum(levels) and all(0 <= level <= 20 for level in child)
    assert len(after) == len(modes) and set(after) <= {0, 1}


def test_a_mutation_moves_levels_modes_or_both():
    kinds = set()
    for seed in range(40):
        levels, modes = split(switch_with_modes([5, 5, 5, 1, 1, 1], random.Random(seed), 10, 1), 3)
        kinds.add((levels != [5, 5, 5], modes != [1, 1, 1]))
    assert kinds == {(True, False), (False, True), (True, True)}


@given(genes, seeds)
def test_a_crossover_takes_the_mode_with_the_sparsity(parents, seed):
    levels, modes = parents
    blocks = len(levels)
    other = random.Random(seed).sample(levels, blocks)
    a, b = [*levels, *modes[:blocks]], [*other, *modes[blocks:]]
    child, found = split(crossover_with_modes(a, b, random.Random(seed)), blocks)
    assert sum(child) == sum(levels)
    for level, mode, x, y, first, second in zip(child, found, levels, other, a[blocks:], b[blocks:]):
        nearer = (
            {first, second}
            if abs(level - x) == abs(level - y)
            else {first if abs(level - x) < abs(level - y) else second}
        )
        assert mode in nearer


def test_a_pair_is_that_of_the_list_of_all_pairs():
    for givers, takers in (([0, 2, 3], [1, 2, 4]), ([1], [1, 5]), ([0, 1], [0, 1]), ([4], [2])):
        pairs = [(giver, taker) for giver in givers for taker in takers if giver != taker]
        assert [operators._pair(givers, takers, number) for number in range(len(pairs))] == pairs
