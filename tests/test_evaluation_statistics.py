"""Statistics against values worked out by hand or published."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ftp_lightning.evaluation.spread import jackknife
from ftp_lightning.evaluation.statistics import (
    Interval,
    chance_of,
    clustered,
    mcnemar_p,
    paired,
    ratio_interval,
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
    assert mcnemar_p(5, 0) == pytest.approx(2 / 32)
    assert mcnemar_p(1, 3) == pytest.approx(2 * (1 + 4) / 16)
    assert mcnemar_p(2, 2) == 1.0
    assert mcnemar_p(3, 9) == mcnemar_p(9, 3) == pytest.approx(2 * (1 + 12 + 66 + 220) / 4096)
    assert mcnemar_p(1500, 1500) == 1.0  # large counts neither overflow nor lose precision


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


def test_documents_not_items_are_what_varies():
    # 2 documents of 50 identical items each: half the spread of the two is known from one difference alone.
    found = clustered([1.0] * 50 + [-1.0] * 50, ["a"] * 50 + ["b"] * 50)
    reach = stats.t.ppf(0.975, 1)  # standard error 1, one degree of freedom
    assert (found.value, found.items, found.clusters) == (0.0, 100, 2)
    assert (found.low, found.high) == (pytest.approx(-reach), pytest.approx(reach))


def test_documents_of_one_item_each_get_students_interval():
    values = [0.3, 0.5, 0.4, 1.9, 0.1]
    found = clustered(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found == clustered(values, "abcde")


def test_documents_weigh_by_their_items():
    found = clustered([3.0, 0.0, 0.0], ["a", "b", "b"])
    # Left out in turn: mean 0 without a, 3 without b, both around 1: V = 1/2 (1 + 4).
    assert found.value == 1.0 and found.high - found.value == pytest.approx(stats.t.ppf(0.975, 1) * 2.5**0.5)


def test_degrees_of_freedom_fall_where_one_document_holds_most_items():
    even = jackknife(np.zeros(40), np.repeat(np.arange(4), 10))[1]
    uneven = jackknife(np.zeros(40), np.repeat(np.arange(4), [37, 1, 1, 1]))[1]
    assert even == pytest.approx(3) and 1 <= uneven < 1.2


def test_seeds_are_students_interval_where_each_has_documents_of_its_own():
    seeds, documents = [0, 0, 1, 1, 2, 2], "abcdef"
    values = [0.0, 1.0, 10.0, 11.0, -8.0, -7.0]
    low, high = stats.ttest_1samp([0.5, 10.5, -7.5], 0).confidence_interval(0.95)
    found = clustered(values, documents, seeds)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high)) and found.seeds == 3
    assert found.high - found.low > 2 * (clustered(values, documents).high - found.value)


def test_seeds_that_agree_by_luck_do_not_narrow_what_documents_say():
    values, documents = [1.0, -1.0, -1.0, 1.0], "abcd"
    assert clustered(values, documents, [0, 0, 1, 1]).high >= clustered(values, documents).high


def test_documents_that_come_back_under_every_seed_add_to_the_seeds():
    # value = seed effect + document effect, no noise: V = var(seeds)/6 + var(documents)/12 - var(cells)/72.
    seed_effect, document_effect = range(6), range(12)
    rows = [(float(s + d), d, s) for s in seed_effect for d in document_effect]
    found = clustered(*zip(*rows, strict=True))
    between, across = np.var(seed_effect, ddof=1) / 6, np.var(document_effect, ddof=1) / 12
    df = (between + across) ** 2 / (between**2 / 5 + across**2 / 11)
    inside = np.var([row[0] for row in rows], ddof=1) / 72
    wanted = stats.t.ppf(0.975, df) * (between + across - inside) ** 0.5
    assert found.high - found.value == pytest.approx(wanted)
    assert wanted > max(stats.t.ppf(0.975, 5) * between**0.5, stats.t.ppf(0.975, 11) * across**0.5)


@pytest.mark.parametrize("documents", [["a"] * 3, [None] * 3])
def test_one_document_has_no_interval(documents):
    found = clustered([1.0, 2.0, 4.0], documents)
    assert (found.low, found.high, found.note, found.sign) == (None, None, "one document: no interval", 0)
    assert found.scaled(3).value == pytest.approx(7) and found.scaled(3).low is None
    pair = paired([1, 1, 0], [0, 1, 0], documents)
    assert pair.value == pytest.approx(1 / 3) and pair.low is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_an_item_that_is_not_finite_gives_no_interval(value):
    for found in (clustered([value, 1, 0]), paired([value, 1, 0], [1, 1, 0])):
        assert found.low is None and found.high is None and "not finite" in found.note and found.sign == 0
        assert found.value == (float("inf") if value == float("inf") else None)
    for pruned, dense in (([value, 1.0], [1.0, 1.0]), ([1.0, 1.0], [value, 1.0])):
        assert ratio_interval([(pruned, dense, 0.25, None, None)]).low is None


def test_nothing_and_lengths():
    assert clustered([]) == Interval(None, None, None, 0, 0, 0, "no items")
    with pytest.raises(ValueError):
        clustered([1.0, 2.0], ["a"])
    with pytest.raises(ValueError):
        paired([1.0, 2.0], [1.0])


@given(st.integers(2, 12), st.integers(1, 30), st.integers(0, 10_000))
def test_a_share_is_never_surer_than_wilson_of_all_items(documents, size, seed):
    rng = np.random.default_rng(seed)
    right = rng.random(documents * size) < rng.choice([0.5, 0.95, 1.0])
    found = clustered(right, np.repeat(np.arange(documents), size).tolist())
    low, high = wilson_interval(int(right.sum()), len(right))
    assert 0 <= found.low <= low <= found.value <= high <= found.high <= 1


def test_all_kept_is_not_beyond_doubt():
    few, many = (clustered([1.0] * 120, [i % n for i in range(120)]) for n in (3, 40))
    assert few.high == many.high == 1.0
    assert few.low < many.low < 1.0 and few.low < 0.9 < many.low
    seeds = clustered([1.0] * 120, [i % 40 for i in range(120)], [i // 40 for i in range(120)])
    assert seeds.low < many.low


def test_methods_that_never_differ_are_not_equal_beyond_doubt():
    right = [1.0, 0.0] * 50
    found = paired(right, right)
    reach = stats.t.ppf(0.975, 99) / 102  # Agresti and Min's of 0 and 0 changed among 100
    assert (found.low, found.high) == (pytest.approx(-reach), pytest.approx(reach))
    few = paired(right, right, [i % 3 for i in range(100)])
    assert few.high > 2 * found.high


def test_chance_is_the_best_constant_answer_where_labels_are_unbalanced():
    assert chance_of([1] * 622 + [0] * 378, 2) == 0.622
    assert chance_of([0, 1] * 50 + [0] * 5, 2) == 0.5  # 55 of 105: no more than luck
    assert chance_of([0, 1, 2, 3, 3], 4) == 0.25
    assert chance_of([], 4) == 0.25
    assert chance_of([3] * 40, 4) == 1.0


def test_an_interval_is_written_as_far_as_it_is_known():
    known = Interval(0.668, 0.612, 0.72, 400, 328)
    assert f"{known.scaled(100):.1f}" == "66.8 [61.2, 72.0]" and f"{known:+.2f}" == "+0.67 [+0.61, +0.72]"
    assert f"{Interval(0.5, None, None, 1, 1):.1f}" == "0.5" and f"{Interval(None, None, None, 0, 0):.1f}" == "–"
    assert f"{known}" == str(known)
