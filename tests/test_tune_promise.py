"""What `tune` promises, on made-up answers: the chosen cut really keeps the share that was asked for."""

import random
from functools import cache

import pytest

from ftp_lightning.evaluation.statistics import Interval, clustered
from ftp_lightning.tuning.outcome import sentences
from ftp_lightning.tuning.promise import climb, holds, prompts_needed, reachable, step_down


@cache
def of_count(kept: int, documents: int, together: int) -> Interval:
    """The interval where so many documents keep all their prompts, and the others lose all."""
    values = [float(document < kept) for document in range(documents) for _ in range(together)]
    return clustered(values, [place // together for place in range(len(values))])


def sampled(share: float, prompts: int, rng: random.Random, together: int = 1) -> Interval:
    """Kept answers at a cut that truly keeps `share`; `together` prompts of a document are kept or lost at once."""
    documents = prompts // together
    return of_count(sum(rng.random() < share for _ in range(documents)), documents, together)


def broken(truth: list[float], keep: float, prompts: int, splits: int, together: int = 1) -> float:
    """Share of splits in which the chosen cut truly keeps less than it was asked to."""
    rng, wrong = random.Random(7), 0
    for _ in range(splits):
        passed = climb(lambda number: sampled(truth[number], prompts, rng, together), len(truth), keep)
        wrong += passed > 0 and truth[passed - 1] < keep
    return wrong / splits


@pytest.mark.parametrize(
    ("truth", "keep", "prompts", "together"),
    [
        ([0.999, 0.995, 0.985, 0.96, 0.9, 0.7], 0.96, 120, 1),
        ([0.9499] * 8, 0.95, 75, 1),  # the worst case: each cut breaks the promise by a hair
        ([0.999, *[0.9499] * 6], 0.95, 200, 1),
        ([0.9799] * 6, 0.98, 200, 1),
        ([0.8999] * 6, 0.9, 160, 4),  # four prompts of one document, all kept or all lost
    ],
)
def test_the_promise_is_kept_in_95_of_100_splits(truth, keep, prompts, together):
    assert broken(truth, keep, prompts, 1000, together) <= 0.05


def test_taking_the_largest_cut_that_looks_good_would_break_it():
    """Why cuts are tested in order: the best of twelve looks good by chance far more often."""
    rng, truth, keep = random.Random(3), [0.9499] * 12, 0.95
    wrong = sum(any(holds(sampled(share, 75, rng), keep) for share in truth) for _ in range(1000)) / 1000
    assert wrong > 0.15 and broken(truth, keep, 75, 1000) <= 0.05


def test_a_cut_that_truly_holds_is_found():
    rng = random.Random(1)
    truth = [1.0, 0.999, 0.998, 0.9, 0.5]
    found = [climb(lambda number: sampled(truth[number], 300, rng), 5, 0.97) for _ in range(100)]
    assert sum(passed == 3 for passed in found) > 90


def interval(value: float, low: float) -> Interval:
    return Interval(value, low, 1.0, 100, 100)


def test_cuts_are_measured_from_the_smallest_to_the_first_that_fails():
    asked, curve = [], [interval(1.0, 0.96), interval(0.99, 0.95), interval(0.98, 0.94), interval(1.0, 0.99)]

    def measure(number):
        asked.append(number)
        return curve[number]

    assert climb(measure, 4, 0.95) == 2 and asked == [0, 1, 2]
    assert climb(measure, 4, 0.95, lambda: False) == 1  # out of time
    assert climb(measure, 2, 0.9) == 2
    assert climb(lambda _: Interval(1.0, None, None, 9, 1, note="one document"), 4, 0.5) == 0


def test_held_out_prompts_confirm_the_choice_or_step_down():
    asked, shares = [], [1.0, 0.97, 0.93]

    def measure(number):
        asked.append(number)
        return interval(shares[number], 0.0)

    assert step_down(measure, 3, 0.93) == 3 and asked == [2]
    assert step_down(measure, 3, 0.95) == 2 and asked == [2, 2, 1]
    assert step_down(lambda _: interval(0.5, 0.0), 3, 0.9) == 0


def test_what_few_prompts_can_show():
    assert reachable(range(15)) == pytest.approx(0.796, abs=1e-3)
    assert reachable(["a"] * 15) == 0.0
    enough = prompts_needed(0.97)
    assert reachable(range(enough // 2)) >= 0.97 > reachable(range(enough // 2 - 2))


@pytest.mark.parametrize(("speed", "said"), [(0.92, "takes 1.09 times as long: "), (1.2, "comes 1.20 times as fast.")])
def test_a_pruner_that_gains_no_time_says_so(speed, said):
    row = {"flops_cut": 0.1, "items": 20, "kept": 1.0, "kept_low": 0.83, "kept_high": 1.0, "speed": speed}
    about = {"keep": 0.7, "confirmed": True, "ended_by_time": False, "curve": [{"holds": False}]}
    told = sentences(about | {"chosen": row, "held_out": [row]})
    assert told[-1].startswith(f"The first token of a typical prompt {said}")
