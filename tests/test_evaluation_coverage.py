"""Coverage by simulation: a nominal 95 % interval holds the truth in at least 93 % of the trials."""

import numpy as np
import pytest
from scipy import stats

from ftp_lightning.evaluation.statistics import clustered, paired

DOCUMENTS = (2, 3, 5, 10, 20, 40)
TIERS = [pytest.param(100, id="quick"), pytest.param(5000, id="slow", marks=pytest.mark.slow)]


def covers(hits, trials):
    """Whether so many hits agree with a coverage of 93 % or more: the slow tier's margin is a tenth of a point."""
    return stats.binomtest(hits, trials, 0.93, alternative="less").pvalue > 0.01


def sizes(rng, documents):
    """Documents hold 1 to some 20 questions, most of them few."""
    return 1 + rng.geometric(0.12, documents)


def differences(rng, documents):
    """Questions of documents that differ; the true mean is 0."""
    labels = np.repeat(np.arange(documents), sizes(rng, documents))
    return rng.normal(0, 0.1, documents)[labels] + rng.normal(0, 0.3, len(labels)), labels.tolist()


def answers(rng, documents, share):
    """0/1 of documents whose shares differ (intraclass correlation 0.05) around `share`."""
    own = rng.beta(19 * share, 19 * (1 - share), documents)
    labels = np.repeat(np.arange(documents), sizes(rng, documents))
    return (rng.random(len(labels)) < own[labels]).astype(float), labels.tolist()


def percentile_bootstrap(values, documents, rng, samples=500):
    """What the project used before: documents resampled, percentiles taken."""
    totals, counts = np.bincount(documents, weights=values), np.bincount(documents)
    kinds = counts > 0
    totals, counts = totals[kinds], counts[kinds]
    drawn = rng.multinomial(len(totals), np.full(len(totals), 1 / len(totals)), size=samples)
    return np.percentile(drawn @ totals / (drawn @ counts), [2.5, 97.5])


def hits(trials, truth, draw, interval):
    found = (interval(*draw()) for _ in range(trials))
    return sum(low <= truth <= high for low, high in found)


def ours(*columns):
    found = clustered(*columns)
    return found.low, found.high


@pytest.mark.parametrize("trials", TIERS)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_differences_between_few_and_many_documents(documents, trials):
    rng = np.random.default_rng(documents)
    assert covers(hits(trials, 0.0, lambda: differences(rng, documents), ours), trials)


@pytest.mark.parametrize("trials", TIERS)
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_answers_kept(documents, share, trials):
    rng = np.random.default_rng(documents)
    assert covers(hits(trials, share, lambda: answers(rng, documents, share), ours), trials)


@pytest.mark.parametrize("documents", [2, 3, 5])
def test_the_percentile_bootstrap_did_not_cover(documents):
    rng = np.random.default_rng(documents)
    bootstrap = hits(400, 0.0, lambda: differences(rng, documents), lambda v, d: percentile_bootstrap(v, d, rng))
    assert not covers(bootstrap, 400) and bootstrap < 0.88 * 400


def seeded(rng, between, crossed, seeds=3, books=3, each=15):
    """Three trainings measured on three books, `between` the standard deviation of the trainings; the true mean is 0.
    crossed: the same books under every seed."""
    seed, book = np.repeat(np.arange(seeds), books * each), np.tile(np.repeat(np.arange(books), each), seeds)
    label = book if crossed else book + books * seed
    values = rng.normal(0, between, seeds)[seed] + rng.normal(0, 0.05, books * seeds)[label]
    return values + rng.normal(0, 0.3, len(values)), label.tolist(), seed.tolist()


@pytest.mark.parametrize("trials", TIERS)
@pytest.mark.parametrize("crossed", [True, False])
@pytest.mark.parametrize("between", [0.0, 0.05, 0.5])
def test_three_seeds(between, crossed, trials):
    rng = np.random.default_rng(round(100 * between))
    assert covers(hits(trials, 0.0, lambda: seeded(rng, between, crossed), ours), trials)


@pytest.mark.parametrize("pool", ["items", "documents"])
def test_pooling_the_items_of_three_seeds_did_not_cover(pool):
    rng = np.random.default_rng(0)

    def pooled(values, documents, seeds):
        labels = np.arange(len(values)) if pool == "items" else np.array(documents)
        return percentile_bootstrap(values, labels, rng)

    bootstrap = hits(200, 0.0, lambda: seeded(rng, 0.5, crossed=False), pooled)
    assert bootstrap < 0.8 * 200


@pytest.mark.parametrize("trials", TIERS)
def test_three_seeds_of_answers(trials):
    """Shares of right answers, logit-normal between seeds, the same questions under each."""
    rng = np.random.default_rng(5)
    truth = float(np.mean(1 / (1 + np.exp(-(2.5 + 0.7 * rng.normal(size=200_000))))))

    def draw():
        own = 1 / (1 + np.exp(-(2.5 + 0.7 * rng.normal(size=3))))
        right = (rng.random(40)[None, :] < own[:, None]).astype(float)
        return right.ravel(), list(range(40)) * 3, np.repeat([0, 1, 2], 40).tolist()

    assert covers(hits(trials, truth, draw, ours), trials)


@pytest.mark.parametrize("trials", TIERS)
@pytest.mark.parametrize("changed", [0.01, 0.2])
def test_paired_answers(changed, trials):
    """Two methods that are equally good and differ on some items: the true difference is 0."""
    rng = np.random.default_rng(7)

    def pair():
        one, labels = answers(rng, 20, 0.9)
        flipped = rng.random(len(one)) < changed
        both = np.where(flipped, rng.random(len(one)) < 0.9, one), np.where(flipped, rng.random(len(one)) < 0.9, one)
        return *both, labels

    def interval(*columns):
        found = paired(*columns)
        return found.low, found.high

    assert covers(hits(trials, 0.0, pair, interval), trials)
