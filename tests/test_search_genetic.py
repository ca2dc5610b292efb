"""The search keeps the budget, never loses what it had, and goes on after an interruption as if there had been none."""

import json
import random

import pytest

from ftp_lightning.errors import UserError
from ftp_lightning.schedule import Schedule
from ftp_lightning.search import allocations
from ftp_lightning.search.fitness import MemoFitness
from ftp_lightning.search.genetic import genetic_search, stage_indices
from ftp_lightning.search.settings import SearchSettings

BLOCKS, BUDGET = 8, 0.4
KINDS = ["plain", "recall"] * 6
TARGET = allocations.ramp(BLOCKS, BUDGET)


class Distance(MemoFitness):
    """Squared distance from a hidden schedule; windows differ by a little noise, so minibatches rank imperfectly."""

    def __init__(self):
        super().__init__(KINDS)

    def measure(self, schedule, indices):
        self.forward_tokens += 10 * len(indices)
        distance = sum((a - b) ** 2 for a, b in zip(schedule.sparsity, TARGET.sparsity))
        noise = sum(random.Random(f"{schedule.key()}/{i}").random() for i in indices) / len(indices)
        return distance * (1 + 0.1 * noise)


def seeds():
    rng = random.Random(5)
    return {
        "uniform": allocations.uniform(BLOCKS, BUDGET),
        "late": allocations.late(BLOCKS, BUDGET),
        "random": allocations.random_allocation(BLOCKS, BUDGET, rng),
    }


def settings(**changes):
    return SearchSettings(**{"budget": BUDGET, "generations": 8, "seed": 3, **changes})


def test_it_finds_a_better_schedule_of_the_same_budget():
    result = genetic_search(Distance(), BLOCKS, settings(generations=25), seeds())
    assert abs(result.schedule.budget - BUDGET) <= 1e-9
    assert result.value == Distance()(result.schedule)
    assert result.value < 0.25 * min(result.allocations.values())


def test_the_allocations_are_scored_as_they_were_given():
    result = genetic_search(Distance(), BLOCKS, settings(generations=0), seeds())
    assert result.allocations == {name: Distance()(schedule) for name, schedule in seeds().items()}
    assert result.value <= min(result.allocations.values())


@pytest.mark.parametrize("seed", range(5))
def test_the_result_is_never_worse_than_the_best_seed(seed):
    """The hidden optimum itself, off the grid of levels, is among the seeds: no level list is as good."""
    result = genetic_search(Distance(), BLOCKS, settings(seed=seed, generations=3), {**seeds(), "target": TARGET})
    assert result.value == 0.0 and result.schedule == TARGET


def test_the_best_never_gets_worse_and_the_log_is_complete():
    result = genetic_search(Distance(), BLOCKS, settings(), seeds())
    best = [entry["best"] for entry in result.generations]
    assert best == sorted(best, reverse=True) and best[-1] == result.value
    assert [entry["generation"] for entry in result.generations] == list(range(9))
    assert set(result.generations[0]) == {
        "generation", "best", "mean", "children", "evaluations", "memo_hits", "forward_tokens", "population_hash"
    }  # fmt: skip
    assert [entry["children"] for entry in result.generations] == [0] + [12] * 8


def test_the_cost_is_the_minibatch_for_children_and_all_windows_for_survivors():
    fitness = Distance()
    one = settings(generations=1, offspring=10, survivors=3, stage_windows=4)
    result = genetic_search(fitness, BLOCKS, one, seeds())
    first, second = result.generations
    assert second["forward_tokens"] - first["forward_tokens"] == 10 * (10 * 4 + 3 * len(KINDS))
    assert second["evaluations"] - first["evaluations"] == 13


def test_children_of_a_generation_share_one_minibatch():
    asked = []

    class Listening(Distance):
        def __call__(self, schedule, indices=None):
            asked.append(indices)
            return super().__call__(schedule, indices)

    genetic_search(Listening(), BLOCKS, settings(generations=2, offspring=6, stage_windows=4), seeds())
    minibatches = [indices for indices in asked if indices is not None]
    assert len(minibatches) == 12 and len(set(minibatches[:6])) == len(set(minibatches[6:])) == 1
    assert minibatches[0] != minibatches[6]


def test_the_same_seed_gives_the_same_search_and_another_another():
    runs = [genetic_search(Distance(), BLOCKS, settings(seed=s), seeds()) for s in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0].generations[1]["population_hash"] != runs[2].generations[1]["population_hash"]


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_interrupted_equals_uninterrupted(stop):
    """The state goes through JSON into a new process' fitness; result and log are the same to the last bit."""
    states = []
    whole = genetic_search(Distance(), BLOCKS, settings(), seeds(), on_generation=states.append)
    assert len(states) == 9
    state = json.loads(json.dumps(states[stop]))
    assert genetic_search(Distance(), BLOCKS, settings(), seeds(), resume=state) == whole


def test_a_state_of_another_search_is_refused():
    states = []
    genetic_search(Distance(), BLOCKS, settings(generations=1), seeds(), on_generation=states.append)
    with pytest.raises(UserError, match="other settings"):
        genetic_search(Distance(), BLOCKS, settings(generations=1, seed=9), seeds(), resume=states[0])
    with pytest.raises(UserError, match="other seeds"):
        genetic_search(Distance(), BLOCKS, settings(generations=1), {"target": TARGET}, resume=states[0])


def test_patience_stops_a_search_that_stands_still():
    result = genetic_search(Distance(), BLOCKS, settings(generations=50, patience=2), {"target": TARGET})
    assert result.generations[-1]["generation"] == 2


def test_the_map_is_a_seam():
    """A map that works backwards, as processes might, changes nothing."""
    calls = []

    def backwards(function, items):
        calls.append(len(items))
        return [function(item) for item in reversed(items)][::-1]

    plain = genetic_search(Distance(), BLOCKS, settings(), seeds())
    assert genetic_search(Distance(), BLOCKS, settings(), seeds(), map_function=backwards) == plain
    assert sum(calls) > 100


def test_a_space_without_room_ends_quietly():
    one = {"uniform": Schedule([0.4])}

    class Flat(MemoFitness):
        def measure(self, schedule, indices):
            return 1.0

    assert genetic_search(Flat(KINDS), 1, settings(), one).schedule == one["uniform"]


def test_minibatches_are_balanced_and_seeded():
    kinds = ["plain"] * 10 + ["recall"] * 3
    chosen = stage_indices(kinds, 6, random.Random(0))
    assert len(set(chosen)) == 6 and sum(i >= 10 for i in chosen) == 3 and list(chosen) == sorted(chosen)
    assert sum(i >= 10 for i in stage_indices(kinds, 9, random.Random(0))) == 3
    assert stage_indices(kinds, 99, random.Random(0)) == tuple(range(13))
    assert chosen == stage_indices(kinds, 6, random.Random(0)) != stage_indices(kinds, 6, random.Random(1))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"budget": 1.0}, "budget"),
        ({"budget": -0.1}, "budget"),
        ({"budget": 0.6, "max_sparsity": 0.5}, "budget"),
        ({"offspring": 0}, "offspring"),
        ({"patience": 0}, "patience"),
        ({"crossover": 1.5}, "crossover"),
        ({"generations": -1}, "generations"),
    ],
)
def test_impossible_settings_are_named(changes, name):
    with pytest.raises(UserError, match=name):
        settings(**changes)


@pytest.mark.parametrize(
    "bad",
    [{}, {"a": Schedule.uniform(7, BUDGET)}, {"a": Schedule.uniform(BLOCKS, 0.3)}],
    ids=["none", "blocks", "budget"],
)
def test_seeds_of_another_shape_or_budget_are_refused(bad):
    with pytest.raises(UserError, match="seed"):
        genetic_search(Distance(), BLOCKS, settings(), bad)
