"""How sure we are: 95 % intervals of means over items that come in documents and, for trained methods, in seeds.

All functions take plain sequences, one entry per item. `documents` and `seeds` hold any hashable: whose item it is, and
under which training or search it was measured. Items of one document go together. docs/evaluation.md says it in words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from ftp_lightning.evaluation.spread import Labels, Spread, Z, spread_of, t_quantile

EXTRA = 3
"""Degrees of freedom of a share beyond the documents that hold a loss, see `_korn_graubard` [ours, by simulation]."""
Task = tuple[Sequence[float], Sequence[float], float, Labels, Labels]


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval [low, high].

    Attributes:
        value: the mean (or ratio) over all items; None without items, or where one of them is no number.
        low, high: the interval's ends; None where the data cannot give one, and then `note` says why.
        items, clusters, seeds: how many items, documents and seeds it stands on.
    """

    value: float | None
    low: float | None
    high: float | None
    items: int
    clusters: int
    seeds: int = 1
    note: str = ""

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies above or below 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    def __format__(self, form: str) -> str:
        """`f"{interval:.1f}"` is "66.8 [61.2, 72.0]"; without ends the value alone, without a value a dash."""
        if not form:
            return str(self)
        if self.value is None:
            return "–"
        ends = "" if self.low is None or self.high is None else f" [{self.low:{form}}, {self.high:{form}}]"
        return f"{self.value:{form}}{ends}"

    def scaled(self, factor: float) -> Interval:
        """The same in another unit, for example 100 for points. `factor` must be positive."""
        value, low, high = (None if end is None else factor * end for end in (self.value, self.low, self.high))
        return replace(self, value=value, low=low, high=high)


# ---------------------------------------------------------------- the mean of clustered items


def clustered(values: Sequence[float], documents: Labels = None, seeds: Labels = None) -> Interval:
    """Mean of all items with a 95 % interval that knows documents and seeds [ours].

    The variance is the delete-one-document jackknife of (sum of values) / (number of items), with a t quantile whose
    degrees of freedom fall where few documents hold most items. Several seeds add the jackknife over seeds, see
    `spread_of`. Values that are all 0 or 1 get the Korn-Graubard interval: Clopper-Pearson's of an effective number of
    items, never narrower than Wilson's of all of them; where each item is a document of its own, Wilson's itself.

    Args:
        values: one number per item.
        documents: whose item it is; without it every item is a document of its own. The same document under two
            seeds must have the same label, and different ones different labels.
        seeds: the training or search it was measured under, where that varies.

    Raises:
        ValueError: where the lengths differ.
    """
    data = np.asarray(values, dtype=float)
    spread = spread_of(data, documents, seeds)
    if spread.note:
        return _between(data, spread, None, None)
    if not np.isin(data, (0.0, 1.0)).all():
        return _around(data, spread, spread.reach)
    if spread.independent:
        return _between(data, spread, *wilson_interval(int(data.sum()), len(data)))
    return _between(data, spread, *_korn_graubard(float(data.mean()), len(data), spread))


def paired(a: Sequence[float], b: Sequence[float], documents: Labels = None, seeds: Labels = None) -> Interval:
    """Mean of A minus B on the same items, with the interval of `clustered`.

    Where both are right or wrong (0 or 1), the interval is never narrower than that of Agresti and Min (2005) for
    independent items, so that two methods which never differ are not called equal beyond doubt.
    """
    one, two = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if one.shape != two.shape:
        raise ValueError(f"{len(one)} and {len(two)} items cannot be paired")
    data, spread = one - two, spread_of(one - two, documents, seeds)
    if spread.note:
        return _between(data, spread, None, None)
    if not np.isin([one, two], (0.0, 1.0)).all():
        return _around(data, spread, spread.reach)
    found = _around(data, spread, max(spread.reach, spread.floor(one, two)))
    assert found.low is not None and found.high is not None
    return replace(found, low=max(found.low, -1.0), high=min(found.high, 1.0))


def _between(data: Any, spread: Spread, low: float | None, high: float | None) -> Interval:
    value = None if not len(data) or np.isnan(data).any() else float(data.mean())
    return Interval(value, low, high, len(data), spread.clusters, spread.seeds, spread.note)


def _around(data: Any, spread: Spread, reach: float) -> Interval:
    return _between(data, spread, float(data.mean()) - reach, float(data.mean()) + reach)


# ---------------------------------------------------------------- shares


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) of a share of `successes` in `n` independent trials; (0, 1) where n = 0."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials")
    if n == 0:
        return 0.0, 1.0
    found = stats.binomtest(successes, n).proportion_ci(method="wilson")
    # The ends are exact where nothing, or everything, succeeded; rounding must not say otherwise.
    return (0.0 if successes == 0 else float(found.low)), (1.0 if successes == n else float(found.high))


def _korn_graubard(share: float, items: int, spread: Spread) -> tuple[float, float]:
    """Clopper and Pearson's interval of n* items (Korn and Graubard 1998), joined with Wilson's of all items.

    n* = share (1 - share) / V, less where the t quantile is large, at most the items that are not repeats. Where
    nothing or everything is kept V says nothing, and n* is all of these items less for the t quantile alone. Few
    losses say little about V either: its degrees of freedom are at most EXTRA more than the documents that hold one.
    """
    widen = max(1.0, t_quantile(spread.mixed + EXTRA) / spread.quantile)
    most = spread.distinct * (Z / spread.quantile / widen) ** 2
    edge, reach = share in (0.0, 1.0), widen * spread.reach
    n = most if edge or reach == 0 else min(spread.distinct, share * (1 - share) * (Z / reach) ** 2)
    successes, failures = n * share, n * (1 - share)
    low, high = wilson_interval(round(share * items), items)
    if successes > 0:
        low = min(low, float(stats.beta.ppf(0.025, successes, failures + 1)))
    if failures > 0:
        high = max(high, float(stats.beta.ppf(0.975, successes + 1, failures)))
    return low, high


def mcnemar_p(lost: int, gained: int) -> float:
    """Exact two-sided p-value that losses and gains are equally likely (McNemar 1947); 1 where nothing changed."""
    return float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


# ---------------------------------------------------------------- ratios to dense


def retention(pruned_accs: Sequence[float], dense_accs: Sequence[float]) -> float:
    """100 mean over tasks of pruned accuracy / dense accuracy [paper, "Avg. percentage"].

    ValueError without tasks, where the lengths differ, or where a dense accuracy is 0.
    """
    if not dense_accs or min(dense_accs) <= 0:
        raise ValueError(f"retention needs dense accuracies above 0, got {list(dense_accs)}")
    ratios = [pruned / dense for pruned, dense in zip(pruned_accs, dense_accs, strict=True)]
    return 100 * math.fsum(ratios) / len(ratios)


def skill(pruned: float, dense: float, chance: float, dense_stderr: float) -> float | None:
    """(pruned - chance) / (dense - chance), the share of the skill above guessing that is left [ours].

    None where dense is not more than 2 standard errors above chance: there is no skill to keep, and the task counts in
    no mean.
    """
    if dense - chance <= 2 * dense_stderr:
        return None
    return (pruned - chance) / (dense - chance)


def chance_of(labels: Sequence[int], choices: int) -> float:
    """Share of right answers without reading the question: 1 / choices, or that of the best constant answer.

    The most frequent label counts where a chi-square test tells the labels from equally frequent ones (p < 0.01): a
    small set has a most frequent label by chance. BoolQ: 62 % are "yes".
    """
    counts = np.bincount(np.asarray(labels, dtype=int), minlength=choices)
    if choices < 2 or counts.sum() == 0 or stats.chisquare(counts).pvalue >= 0.01:
        return 1 / choices
    return float(counts.max() / counts.sum())


def ratio_interval(tasks: Sequence[Task]) -> Interval | None:
    """95 % interval of the mean over tasks of (pruned - chance) / (dense - chance) [ours].

    tasks: (pruned scores, dense scores, chance, documents or None, seeds or None) of each, item by item, the same
    questions. With chance 0 this is retention / 100, with one task skill. Each ratio R is linearised: its items are
    (pruned - chance - R (dense - chance)) / (mean dense - chance), and their variances over documents and seeds add up.

    Returns None without tasks, and no ends where the interval of a dense score reaches its chance, or where a task has
    one document: then the ratio is not known.
    """
    if not tasks:
        return None
    ratios, reaches, items, clusters, note = [], [], 0, 0, ""
    for scores, dense_scores, chance, documents, seeds in tasks:
        pruned, dense = np.asarray(scores, dtype=float), np.asarray(dense_scores, dtype=float)
        base = clustered(dense_scores, documents)
        if not (np.isfinite(pruned).all() and np.isfinite(dense).all()):
            return Interval(None, None, None, len(dense), base.clusters, note="an item is not finite: no ratio")
        above = float(dense.mean()) - chance
        if above <= 0 or (base.low is not None and base.low <= chance):
            return Interval(None, None, None, len(dense), base.clusters, note="dense is at chance: no ratio")
        ratio = (float(pruned.mean()) - chance) / above
        rests = (pruned - chance - ratio * (dense - chance)) / above
        spread = spread_of(rests, documents, seeds)
        both = np.isin([pruned, dense], (0.0, 1.0)).all()
        reach = max(spread.reach, spread.floor(pruned, dense) / above if both and not spread.note else 0.0)
        ratios.append(ratio)
        reaches.append(reach)
        items, clusters, note = items + len(dense), clusters + base.clusters, note or base.note
    value, reach = math.fsum(ratios) / len(ratios), math.hypot(*reaches) / len(reaches)
    if note:
        return Interval(value, None, None, items, clusters, note=note)
    return Interval(value, value - reach, value + reach, items, clusters)
