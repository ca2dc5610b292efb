"""Statistics against values worked out by hand or published."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftp_lightning.evaluation.statistics import (
    kept,
    kept_by,
    mcnemar_p,
    paired_bootstrap,
    retention,
    skill,
    wilson_interval,
)


def test_wilson_interval_of_published_examples():
    # Newcombe (1998), Table I: 81 of 263 and 15 of 148, 95 % score interval without continuity correction.
    assert wilson_interval(81, 263) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    assert wilson_interval(15, 148) == (pytest.approx(0.0624, abs=1e-4), pytest.approx(0.1605, abs=1e-4))
    assert wilson_interval(0, 20) == (0.0, pytest.approx(0.1611, abs=1e-4))
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson_interval(3, 2)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share_and_stays_in_bounds(trial):
    successes, n = trial
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    mirrored = wilson_interval(n - successes, n)
    assert mirrored == (pytest.approx(1 - high), pytest.approx(1 - low))


def test_mcnemar_by_hand():
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(5, 0) == 2 / 32
    assert mcnemar_p(1, 3) == pytest.approx(2 * (1 + 4) / 16)
    assert mcnemar_p(2, 2) == 1.0
    assert mcnemar_p(3, 9) == mcnemar_p(9, 3) == pytest.approx(2 * (1 + 12 + 66 + 220) / 4096)
    assert mcnemar_p(1500, 1500) == 1.0  # large counts neither overflow nor lose precision


def test_kept_counts_only_items_that_need_the_passage():
    dense = [1, 1, 1, 1, 0, 0]
    without = [0, 0, 1, 0, 0, 0]
    pruned = [1, 0, 0, 1, 1, 0]
    result = kept(dense, without, pruned)
    assert result.items == 3  # items 0, 1, 3; item 2 is right without the passage
    assert result.share == pytest.approx(2 / 3)
    assert (result.low, result.high) == wilson_interval(2, 3)
    assert (result.gained, result.lost) == (1, 2)
    assert result.p == mcnemar_p(2, 1)


def test_kept_of_nothing_is_unknown():
    result = kept([0, 1], [0, 1], [1, 1])
    assert (result.share, result.low, result.high, result.items) == (None, 0.0, 1.0, 0)
    with pytest.raises(ValueError):
        kept([True], [False], [True, False])


def test_kept_by_splits_the_items():
    near_and_far = kept_by(["far", "near", "far"], [1, 1, 1], [0, 0, 0], [0, 1, 1])
    assert list(near_and_far) == ["far", "near"]
    assert near_and_far["far"] == kept([1, 1], [0, 0], [0, 1])
    assert near_and_far["near"] == kept([1], [0], [1])


def test_retention_and_skill():
    assert retention([0.4, 0.9], [0.5, 0.9]) == pytest.approx(90.0)
    assert skill(0.45, 0.5, 0.25, 0.01) == pytest.approx(0.8)
    assert skill(0.2, 0.5, 0.25, 0.01) < 0  # worse than guessing shows
    assert skill(0.25, 0.26, 0.25, 0.01) is None  # one standard error above chance
    assert skill(0.25, 0.20, 0.25, 0.01) is None
    with pytest.raises(ValueError, match="above 0"):
        retention([0.1], [0.0])
    with pytest.raises(ValueError):
        retention([0.1, 0.2], [0.5])


def test_paired_bootstrap_resamples_documents_not_items():
    # 2 documents of 50 identical items: over items the interval would be narrow, over documents it is all or nothing.
    differences, documents = [1.0] * 50 + [-1.0] * 50, ["a"] * 50 + ["b"] * 50
    mean, low, high = paired_bootstrap(differences, documents, random.Random(0))
    assert (mean, low, high) == (0.0, -1.0, 1.0)


def test_paired_bootstrap_weighs_documents_by_their_items():
    mean, low, high = paired_bootstrap([3.0, 0.0, 0.0], ["a", "b", "b"], random.Random(0))
    assert (mean, low, high) == (1.0, 0.0, 3.0)


def test_paired_bootstrap_agrees_with_the_normal_interval_and_its_seed():
    rng = random.Random(1)
    differences = [rng.gauss(0.5, 1.0) for _ in range(400)]
    result = paired_bootstrap(differences, range(400), random.Random(2))
    mean = sum(differences) / 400
    error = (sum((d - mean) ** 2 for d in differences) / 400 / 400) ** 0.5
    assert result[0] == pytest.approx(mean)
    assert result[1:] == (pytest.approx(mean - 1.96 * error, abs=0.015), pytest.approx(mean + 1.96 * error, abs=0.015))
    assert result == paired_bootstrap(differences, range(400), random.Random(2))
    assert result != paired_bootstrap(differences, range(400), random.Random(3))


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20), st.integers(0, 99))
def test_paired_bootstrap_stays_within_the_documents(differences, seed):
    mean, low, high = paired_bootstrap(differences, range(len(differences)), random.Random(seed), samples=50)
    slack = 1e-9
    assert min(differences) - slack <= low <= high <= max(differences) + slack
    assert mean == pytest.approx(sum(differences) / len(differences), abs=1e-9)


def test_one_document_has_no_spread():
    with pytest.raises(ValueError, match="at least 2"):
        paired_bootstrap([1.0, 2.0], ["a", "a"], random.Random(0))


def test_a_task_is_near_chance_by_the_dense_models_error():
    """A pruned model that guesses has the larger error; it does not decide whether the task measures something."""
    from ftp_lightning.stages.task_cells import _skill

    dense, pruned = ({"score": s, "chance": 0.5, "stderr": e} for s, e in ((0.6, 0.02), (0.55, 0.2)))
    assert _skill(dense, pruned) == (pytest.approx(0.5), True)
    assert _skill(dense | {"stderr": 0.06}, pruned | {"stderr": 0.0}) == (None, True)
