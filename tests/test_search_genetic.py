"""The search keeps the budget, never loses what it had, and goes on after an interruption as if there had been none."""

import json
import random

import pytest

from ftp_lightning.errors import UserError
from ftp_lightning.processes import Processes
from ftp_lightning.schedule import Schedule
from ftp_lightning.search import allocations, genetic, genome
from ftp_lightning.search.family import NEIGHBOUR, search_family
from ftp_lightning.search.fitness import MemoFitness
from ftp_lightning.search.genetic import enough_chunks, genetic_search
from ftp_lightning.search.operators import budget_crossover
from ftp_lightning.search.settings import SearchSettings

BLOCKS, BUDGET = 8, 0.4
SIZES = [2] * 6
"""Windows of each chunk: twelve in all."""
TARGET = allocations.ramp(BLOCKS, BUDGET)


class Distance(MemoFitness):
    """Squared distance from a hidden schedule; chunks differ by a little noise, so minibatches rank imperfectly."""

    def __init__(self, sizes=SIZES, **options):
        super().__init__(sizes, **options)

    def cost(self, schedule, chunk):
        return 10 * self.sizes[chunk]

    def measure(self, schedule, chunk):
        distance = sum((a - b) ** 2 for a, b in zip(schedule.sparsity, TARGET.sparsity))
        return distance * (1 + 0.1 * random.Random(f"{schedule.key()}/{chunk}").random())


def seeds():
    rng = random.Random(5)
    return {
        "uniform": allocations.uniform(BLOCKS, BUDGET),
        "late": allocations.late(BLOCKS, BUDGET),
        "random": allocations.random_allocation(BLOCKS, BUDGET, rng),
    }


def settings(**changes):
    usual = {"generations": 6, "offspring": 8, "stage_windows": (8,), "survivors": (3,), "seed": 3}
    return SearchSettings(**{"budget": BUDGET, **usual, **changes})


def test_it_finds_a_better_schedule_of_the_same_budget():
    result = genetic_search(Distance(), BLOCKS, settings(generations=4), seeds())
    assert abs(result.schedule.budget - BUDGET) <= 1e-9
    assert result.value == Distance()(result.schedule)
    assert result.value < 0.25 * min(result.allocations.values())


def test_a_step_of_one_searches_which_whole_blocks_are_skipped():
    wanted = {1, 4, 6, 7}

    class Cheap(MemoFitness):
        """Skipping a block costs 1, those wanted nothing."""

        def cost(self, schedule, chunk):
            return 1

        def measure(self, schedule, chunk):
            return sum(s * (block not in wanted) for block, s in enumerate(schedule.sparsity))

    about = settings(budget=0.5, step=1.0, generations=20)
    result = genetic_search(Cheap(SIZES), BLOCKS, about, {"late": allocations.late(BLOCKS, 0.5)})
    assert {block for block, s in enumerate(result.schedule.sparsity) if s} == wanted
    assert set(result.schedule.sparsity) == {0.0, 1.0}


def test_the_allocations_are_scored_as_they_were_given():
    result = genetic_search(Distance(), BLOCKS, settings(generations=0), seeds())
    assert result.allocations == {name: Distance()(schedule) for name, schedule in seeds().items()}
    assert result.value <= min(result.allocations.values())


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4))])
def test_the_result_is_never_worse_than_the_best_seed(seed):
    """The hidden optimum itself, off the grid of levels, is among the seeds: no level list is as good."""
    result = genetic_search(Distance(), BLOCKS, settings(seed=seed, generations=3), {**seeds(), "target": TARGET})
    assert result.value == 0.0 and result.schedule == TARGET


def test_the_best_never_gets_worse_and_the_log_is_complete():
    result = genetic_search(Distance(), BLOCKS, settings(generations=5), seeds())
    best = [entry["best"] for entry in result.generations]
    assert best == sorted(best, reverse=True) and best[-1] == result.value
    assert [entry["generation"] for entry in result.generations] == list(range(6))
    assert set(result.generations[0]) == {
        "generation", "best", "mean", "children", "evaluations", "memo_hits", "forward_tokens", "population_hash"
    }  # fmt: skip
    assert [entry["children"] for entry in result.generations] == [0] + [8] * 5


def test_children_cost_their_minibatch_and_survivors_what_is_left_of_all_windows():
    fitness = Distance()
    one = settings(generations=1, offspring=10, survivors=(3,), stage_windows=(4,))
    result = genetic_search(fitness, BLOCKS, one, seeds())
    first, second = result.generations
    assert second["evaluations"] - first["evaluations"] == 10 * 2 + 3 * 4
    assert second["forward_tokens"] - first["forward_tokens"] == 10 * 2 * (10 * 2 + 3 * 4)


def test_without_a_memo_everything_is_measured_again():
    one = settings(generations=1, offspring=10, survivors=(3,), stage_windows=(4,), proposed=0.0)
    result = genetic_search(Distance(memo=False), BLOCKS, one, seeds())
    assert result.generations[1]["evaluations"] - result.generations[0]["evaluations"] == 10 * 2 + 3 * 6
    assert result.generations[1]["memo_hits"] == 0
    assert result.schedule == genetic_search(Distance(), BLOCKS, one, seeds()).schedule


class Listening(Distance):
    """Remembers which schedules were scored on which chunks together."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def scores(self, schedules, chunks=None, map_function=map):
        self.asked.append((len(schedules), chunks))
        return super().scores(schedules, chunks, map_function)


def test_stage_by_stage_fewer_children_share_a_growing_minibatch():
    fitness = Listening()
    stages = {"stage_windows": (2, 6), "survivors": (4, 2)}
    genetic_search(fitness, BLOCKS, settings(generations=2, offspring=8, **stages), seeds())
    first, second = fitness.asked[2:5], fitness.asked[5:8]
    for (children, few), (some, more), (survivors, everything) in (first, second):
        assert (children, some, survivors) == (8, 4, 2) and everything is None
        assert len(few) == 1 and len(more) == 3 and set(few) < set(more)
    assert first[1] != second[1]


def test_a_stage_of_all_windows_measures_every_child_on_them():
    fitness = Listening()
    genetic_search(fitness, BLOCKS, settings(generations=1, stage_windows=(12,), survivors=(8,)), seeds())
    assert fitness.asked[2:] == [(8, None)]


def test_stages_are_a_quarter_and_half_of_the_windows_where_nothing_is_asked():
    assert SearchSettings(budget=BUDGET, offspring=8).stages(32) == [(8, 4), (16, 2)]
    assert SearchSettings(budget=BUDGET, offspring=1).stages(1) == []
    assert SearchSettings(budget=BUDGET, offspring=8, stage_windows=(4,)).stages(32) == [(4, 4)]


def test_proposals_of_a_surrogate_find_more_for_the_same_tokens():
    """Mean over seeds of the loss after equal tokens: with proposals at most half of that without."""

    def found(proposed, seed):
        one = settings(generations=10**6, max_forward_tokens=4000, offspring=8, proposed=proposed, seed=seed)
        return genetic_search(Distance(), BLOCKS, one, seeds()).value

    without, proposed = (sum(found(share, seed) for seed in range(2)) for share in (0.0, 0.75))
    assert proposed < 0.5 * without


@pytest.mark.parametrize(
    "about", [{}, {"step": 0.3}, {"max_sparsity": (0.77,), "min_sparsity": (0.1,)}, {"search_kv": True, "step": 0.3}]
)
def test_the_surrogate_sees_the_schedules_that_are_measured(about):
    """The sparsities, also where an upper bound has cut something off."""
    genes, rng = genome.Genome(BLOCKS, settings(**about)), random.Random(1)
    drawn = [genes.anywhere(rng) for _ in range(40)]
    drawn += [genes.mutant(one, rng) for one in drawn]
    schedules = [genes.planned(one) for one in drawn]
    signs = [[-1 if mode == "evict" else 1 for mode in one.kv or [""] * BLOCKS] for one in schedules]
    expected = [[s * sign for s, sign in zip(one.sparsity, row)] for one, row in zip(schedules, signs)]
    assert genes.features(drawn).tolist() == expected


def test_proposals_need_a_memo():
    with pytest.raises(UserError, match="nothing remembers"):
        genetic_search(Distance(memo=False), BLOCKS, settings(), seeds())


def test_a_stage_of_more_windows_than_there_are_is_refused():
    with pytest.raises(UserError, match="asks for 13 calibration windows, there are 12"):
        genetic_search(Distance(), BLOCKS, settings(stage_windows=(13,)), seeds())


@pytest.mark.parametrize(("size", "expected"), [(1, 3.5), (3, 784 / 512)])
def test_a_parent_is_the_best_of_so_many_random_ones(size, expected):
    """The least of `size` draws from 0 ... 7 is k or more with probability ((8 - k) / 8) ** size."""
    alone = settings(tournament=size, crossover=0.0)
    search, rng = genetic._Search(Distance(), genome.Genome(BLOCKS, alone), Processes()), random.Random(0)
    population = [genetic.Individual([0] * BLOCKS, loss) for loss in range(8)]
    picked = [search._origin(population, rng).loss for _ in range(4000)]
    assert sum(picked) / 4000 == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(("crossover", "happens"), [(0.0, False), (1.0, True)])
def test_children_are_mixed_as_often_as_asked(monkeypatch, crossover, happens):
    mixed = []

    def mate(one, other, rng):
        mixed.append((one, other))
        return budget_crossover(one, other, rng)

    monkeypatch.setattr(genome, "budget_crossover", mate)
    genetic_search(Distance(), BLOCKS, settings(generations=3, proposed=0.0, crossover=crossover), seeds())
    assert bool(mixed) == happens and all(one is not other for one, other in mixed)


def test_a_proposal_that_improves_the_best_is_counted_for_its_reach():
    states = []
    genetic_search(Distance(), BLOCKS, settings(generations=4, proposed=1.0), seeds(), states.append)
    bests = [entry["best"] for entry in states[-1]["log"]]
    improved = sum(after < before for before, after in zip(bests, bests[1:]))
    assert sum(states[-1]["wins"]) == improved > 0 and len(states[-1]["wins"]) == len(genetic.REACH)


def test_bounds_hold_for_every_block():
    lower, upper = (0.0,) * 4 + (0.2,) * 4, (0.3,) * 4 + (0.9,) * 4
    bounded = settings(min_sparsity=lower, max_sparsity=upper, generations=6)
    start = {"project": allocations.project([0.4] * BLOCKS, BUDGET, lower, upper)}
    tried = []

    class Watched(Distance):
        def measure(self, schedule, chunk):
            tried.append(schedule)
            return super().measure(schedule, chunk)

    found = genetic_search(Watched(), BLOCKS, bounded, start).schedule
    assert len(set(tried)) > 40 and abs(found.budget - BUDGET) <= 1e-9
    for schedule in tried:
        assert abs(schedule.budget - BUDGET) <= 1e-9
        assert all(low - 1e-9 <= s <= high + 1e-9 for low, s, high in zip(lower, schedule.sparsity, upper))


def test_bounds_of_another_number_of_blocks_are_refused():
    with pytest.raises(UserError, match="7 values were given for 8 blocks"):
        genetic_search(Distance(), BLOCKS, settings(max_sparsity=(1.0,) * 7), seeds())


def test_the_same_seed_gives_the_same_search_and_another_another():
    runs = [genetic_search(Distance(), BLOCKS, settings(seed=s, generations=2), seeds()) for s in (3, 3, 4)]
    assert runs[0] == runs[1]
    assert runs[0].generations[1]["population_hash"] != runs[2].generations[1]["population_hash"]


@pytest.fixture(scope="module")
def uninterrupted():
    """Its settings, its result, and the state after each generation."""
    states, four = [], settings(generations=4)
    return four, genetic_search(Distance(), BLOCKS, four, seeds(), on_generation=states.append), states


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_interrupted_equals_uninterrupted(uninterrupted, stop):
    """The state goes through JSON into a new process' fitness; result and log are the same to the last bit."""
    four, whole, states = uninterrupted
    assert len(states) == 5
    state = json.loads(json.dumps(states[stop]))
    fitness = Distance()
    assert genetic_search(fitness, BLOCKS, four, seeds(), resume=state) == whole
    assert fitness.forward_tokens == whole.generations[-1]["forward_tokens"]


def test_a_state_of_another_search_is_refused():
    states = []
    genetic_search(Distance(), BLOCKS, settings(generations=1), seeds(), on_generation=states.append)
    with pytest.raises(UserError, match="other settings"):
        genetic_search(Distance(), BLOCKS, settings(generations=1, seed=9), seeds(), resume=states[0])
    with pytest.raises(UserError, match="other fitness"):
        genetic_search(Distance([3] * 4), BLOCKS, settings(generations=1), seeds(), resume=states[0])
    with pytest.raises(UserError, match="other seeds"):
        genetic_search(Distance(), BLOCKS, settings(generations=1), {"target": TARGET}, resume=states[0])


def test_the_rule_that_stops_a_search_is_told():
    still = genetic_search(Distance(), BLOCKS, settings(generations=50, patience=2), {"target": TARGET})
    assert still.generations[-1]["generation"] == 2 and still.stopped == "patience"
    assert genetic_search(Distance(), BLOCKS, settings(generations=2), seeds()).stopped == "generations"
    dear = genetic_search(Distance(), BLOCKS, settings(max_forward_tokens=2000), seeds())
    assert dear.stopped == "max_forward_tokens"
    *before, last = (entry["forward_tokens"] for entry in dear.generations)
    assert before[-1] < 2000 <= last
    assert genetic_search(Distance(), BLOCKS, settings(max_seconds=1e-9), seeds()).stopped == "max_seconds"


def test_the_map_is_a_seam():
    """A map that works backwards, as processes might, changes nothing."""
    calls = []

    class Backwards(Processes):
        def map(self, function, items):
            calls.append(len(items))
            return [function(item) for item in reversed(items)][::-1]

    three = settings(generations=3)
    plain = genetic_search(Distance(), BLOCKS, three, seeds())
    assert genetic_search(Distance(), BLOCKS, three, seeds(), processes=Backwards()) == plain
    assert sum(calls) > 100


def test_a_space_without_room_ends_quietly():
    one = {"uniform": Schedule([0.4])}

    class Flat(MemoFitness):
        def measure(self, schedule, chunk):
            return 1.0

        def cost(self, schedule, chunk):
            return 1

    assert genetic_search(Flat(SIZES), 1, settings(), one).schedule == one["uniform"]


def test_a_stage_is_the_fewest_whole_chunks_that_hold_its_windows():
    assert enough_chunks([4, 4, 4, 2], [3, 1, 0, 2], 1) == [3]
    assert enough_chunks([4, 4, 4, 2], [3, 1, 0, 2], 6) == [1, 3]
    assert enough_chunks([4, 4, 4, 2], [3, 1, 0, 2], 7) == [0, 1, 3]
    assert enough_chunks([4, 4, 4, 2], [3, 1, 0, 2], 99) == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_family_warm_starts_each_budget_and_resumes_between_and_within_them():
    ask = {budget: {"uniform": Schedule.uniform(BLOCKS, budget)} for budget in (0.6, 0.2, 0.4)}
    states = []
    whole = search_family(Distance(), BLOCKS, settings(generations=3), ask, states.append)
    assert list(whole) == [0.2, 0.4, 0.6] and len(states) == 20  # two budgets were searched again
    assert [abs(found.schedule.budget - budget) <= 1e-9 for budget, found in whole.items()] == [True] * 3
    assert [list(found.allocations) for found in whole.values()] == [["uniform"], *[["uniform", NEIGHBOUR]] * 2]
    for stop in (1, 3, 5, 10):
        state = json.loads(json.dumps(states[stop]))
        assert search_family(Distance(), BLOCKS, settings(generations=3), ask, resume=state) == whole


def test_a_family_looks_again_where_the_budget_above_knows_better():
    ask = {b: {"uniform": Schedule.uniform(BLOCKS, b)} for b in (0.1, 0.2, 0.6)}
    ask[0.6]["ramp"] = allocations.ramp(BLOCKS, 0.6)
    states = []
    found = search_family(Distance(), BLOCKS, settings(generations=1, offspring=1), ask, states.append)
    above = allocations.project(found[0.6].schedule.sparsity, 0.2, 0.0, 1.0)
    uniform = Distance()(Schedule.uniform(BLOCKS, 0.2))
    assert found[0.2].value <= Distance()(above) < uniform
    assert [entry["generation"] for entry in found[0.2].generations] == [0, 1, 0, 1]
    for state in json.loads(json.dumps(states)):
        again = search_family(Distance(), BLOCKS, settings(generations=1, offspring=1), ask, resume=state)
        assert again == found


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"budget": 1.0}, "budget"),
        ({"budget": -0.1}, "budget"),
        ({"budget": 0.6, "max_sparsity": (0.5,)}, "allow 0 to 0.5"),
        ({"budget": 0.1, "min_sparsity": (0.2,)}, "allow 0.2 to 1"),
        ({"min_sparsity": (0.0, 0.9), "max_sparsity": (1.0, 0.5)}, "block 1"),
        ({"min_sparsity": (0.0, 0.1), "max_sparsity": (1.0, 0.5, 0.6)}, "min_sparsity has 2 blocks"),
        ({"stage_windows": (8, 4), "survivors": (3, 2)}, "more windows"),
        ({"stage_windows": (4, 8), "survivors": (3, 4)}, "fewer children"),
        ({"stage_windows": (4, 8)}, "one number for each stage"),
        ({"stage_windows": (0,)}, "at least 1"),
        ({"tournament": 0}, "tournament"),
        ({"max_forward_tokens": 0}, "max_forward_tokens"),
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


def test_proposals_may_begin_anywhere(monkeypatch):
    """Also within bounds, and with nothing but such proposals the search finds its way."""
    from ftp_lightning.search import genetic

    assert any(anywhere for _, _, anywhere in genetic.REACH)
    monkeypatch.setattr(genetic, "REACH", tuple(one for one in genetic.REACH if one[-1]))
    bounds = {"min_sparsity": (0.1,) * 4 + (0.2,) * 4, "max_sparsity": (0.9,)}
    about = settings(generations=4, proposed=1.0, **bounds)
    start = {"uniform": allocations.uniform(BLOCKS, BUDGET)}
    result = genetic_search(Distance(), BLOCKS, about, start)
    assert abs(result.schedule.budget - BUDGET) <= 1e-9
    assert all(low - 1e-9 <= s <= 0.9 + 1e-9 for s, low in zip(result.schedule.sparsity, bounds["min_sparsity"]))
    assert result.value < 0.7 * result.allocations["uniform"]


WANTED = ("evict", "keep", "keep", "evict", "keep", "evict", "keep", "keep")


class ModedDistance(Distance):
    """The same, and a loss for every pruned block of another mode than the hidden one."""

    def measure(self, schedule, chunk):
        wrong = sum(s for s, mode, best in zip(schedule.sparsity, schedule.kv, WANTED, strict=True) if mode != best)
        return super().measure(schedule.under(None), chunk) + 0.02 * wrong


def moded(**changes):
    return settings(**{"offspring": 6, "survivors": (2,), "search_kv": True} | changes)


def moded_seeds():
    return {f"{name}, {kv}": seed.under(kv) for kv in ("evict", "keep") for name, seed in seeds().items()}


def test_modes_are_searched_with_the_sparsities():
    result = genetic_search(ModedDistance(), BLOCKS, moded(generations=14), moded_seeds())
    assert abs(result.schedule.budget - BUDGET) <= 1e-9 and result.value == ModedDistance()(result.schedule)
    assert result.value < 0.5 * min(result.allocations.values()) and set(result.schedule.kv) == {"evict", "keep"}
    pruned = [block for block, s in enumerate(result.schedule.sparsity) if s > 0.1]
    assert sum(result.schedule.kv[block] == WANTED[block] for block in pruned) >= len(pruned) - 1


def test_a_dense_block_has_one_mode_so_that_nothing_is_measured_twice():
    made = genome.Genome(3, SearchSettings(budget=0.4, search_kv=True))
    for kv in ("evict", "keep"):
        individual = made.nearest(Schedule([0.0, 0.6, 0.6], kv))
        assert individual[3:] == [1, *[("evict", "keep").index(kv)] * 2]
        assert made.schedule(individual) == made.measured(Schedule([0.0, 0.6, 0.6], kv))
    lifted = genome.Genome(2, SearchSettings(budget=0.4, min_sparsity=(0.1,), search_kv=True))
    assert lifted.schedule(lifted.nearest(Schedule([0.1, 0.7], "evict"))).kv == ("evict", "evict")


def test_a_search_of_modes_goes_on_as_if_uninterrupted():
    states, asked = [], moded(generations=3)
    whole = genetic_search(ModedDistance(), BLOCKS, asked, moded_seeds(), states.append)
    fitness = ModedDistance()
    again = genetic_search(fitness, BLOCKS, asked, moded_seeds(), resume=json.loads(json.dumps(states[1])))
    assert again == whole and fitness.state_dict()["memo"] == states[-1]["memo"]["memo"]
    with pytest.raises(UserError, match="other settings"):
        genetic_search(ModedDistance(), BLOCKS, settings(generations=3), seeds(), resume=states[1])


def test_a_seed_without_a_mode_is_refused_where_modes_are_searched():
    with pytest.raises(UserError, match="uniform says no kv mode"):
        genetic_search(ModedDistance(), BLOCKS, settings(search_kv=True), seeds())


def test_what_is_measured_and_found_is_the_repaired_schedule():
    class Halved(ModedDistance):
        def measure(self, schedule, chunk):
            assert schedule.budget == pytest.approx(BUDGET / 2)
            return super().measure(schedule, chunk)

    def half(schedule):
        return Schedule([s / 2 for s in schedule.sparsity], schedule.kv)

    result = genetic_search(Halved(), BLOCKS, moded(generations=1), moded_seeds(), repair=half)
    assert result.schedule.budget == pytest.approx(BUDGET / 2) and result.value == Halved()(result.schedule)


def test_a_family_of_searched_modes_resumes():
    def start(budget):
        return {f"ramp, {kv}": allocations.ramp(BLOCKS, budget).under(kv) for kv in ("evict", "keep")}

    asked, states = {budget: start(budget) for budget in (0.2, 0.4)}, []
    whole = search_family(ModedDistance(), BLOCKS, moded(generations=1), asked, states.append)
    again = search_family(
        ModedDistance(), BLOCKS, moded(generations=1), asked, resume=json.loads(json.dumps(states[2]))
    )
    assert again == whole and all(found.schedule.kv for found in whole.values())
