"""How sure we are: intervals, kept, retention, skill, and the paired bootstrap. Pure functions of plain numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share of `successes` in `n` trials (Wilson 1927; z = 1.96 is 95 %), within [0, 1].

    (p + z^2/2n -+ z sqrt(p(1 - p)/n + z^2/4n^2)) / (1 + z^2/n), with p = successes / n. (0, 1) where n = 0: nothing is
    known. ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials")
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, z * z / n
    center = share + spread / 2
    reach = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    low, high = (center - reach) / (1 + spread), (center + reach) / (1 + spread)
    # The ends are exact where nothing, or everything, succeeded; rounding must not say otherwise.
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


def mcnemar_p(lost: int, gained: int) -> float:
    """Exact two-sided p-value that losses and gains are equally likely (McNemar 1947, binomial form).

    p = min(1, 2 sum_{k <= min(lost, gained)} C(n, k) / 2^n), n = lost + gained; 1 where nothing changed.
    """
    changed = lost + gained
    tail = sum(math.comb(changed, k) for k in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**changed)


@dataclass(frozen=True)
class Kept:
    """What pruning kept of the answers that needed the passage (method, section 8).

    `items`: dense right with the passage and wrong without it. `share` of them is still right under pruning (None
    where there are none), in the 95 % Wilson interval [low, high]. `gained` and `lost` are counted over all items, `p`
    is McNemar's on the two.
    """

    share: float | None
    low: float
    high: float
    items: int
    gained: int
    lost: int
    p: float


def kept(dense_right: Sequence[bool], dense_right_without: Sequence[bool], pruned_right: Sequence[bool]) -> Kept:
    """Of the items that dense answers right and gets wrong without the passage, the share still right [ours].

    One entry per item, in the same order. ValueError where the lengths differ.
    """
    rows = list(zip(dense_right, dense_right_without, pruned_right, strict=True))
    still = [pruned for dense, without, pruned in rows if dense and not without]
    gained = sum(1 for dense, _, pruned in rows if pruned and not dense)
    lost = sum(1 for dense, _, pruned in rows if dense and not pruned)
    right = sum(map(bool, still))
    low, high = wilson_interval(right, len(still))
    share = right / len(still) if still else None
    return Kept(share, low, high, len(still), gained, lost, mcnemar_p(lost, gained))


def kept_by(
    groups: Sequence[Hashable],
    dense_right: Sequence[bool],
    dense_right_without: Sequence[bool],
    pruned_right: Sequence[bool],
) -> dict[Hashable, Kept]:
    """`kept` of every group of items, for example per distance of the fact.

    groups: one label per item; they come back in the order of their first appearance.
    """
    members: dict[Hashable, list[tuple[bool, bool, bool]]] = {}
    for group, *row in zip(groups, dense_right, dense_right_without, pruned_right, strict=True):
        members.setdefault(group, []).append(cast(tuple[bool, bool, bool], tuple(row)))
    return {group: kept(*zip(*rows, strict=True)) for group, rows in members.items()}


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


def paired_bootstrap(
    differences: Sequence[float], documents: Sequence[Hashable], rng: random.Random, samples: int = 2000
) -> tuple[float, float, float]:
    """Mean paired difference and its 95 % percentile interval, documents (not items) resampled with replacement [ours].

    differences: method A minus method B, one per item; documents: whose item it is, as items of one document go
    together. A sample's value is sum of differences / number of items over the documents drawn. A beats B where the
    interval excludes 0. ValueError where the lengths differ or there are fewer than two documents (no spread could be
    seen).
    """
    sums: dict[Hashable, float] = {}
    counts: dict[Hashable, int] = {}
    for difference, document in zip(differences, documents, strict=True):
        sums[document] = sums.get(document, 0.0) + difference
        counts[document] = counts.get(document, 0) + 1
    if len(sums) < 2:
        raise ValueError(f"a bootstrap over documents needs at least 2 of them, got {len(sums)}")
    totals, sizes = np.array(list(sums.values())), np.array(list(counts.values()))
    generator = np.random.default_rng(rng.getrandbits(64))
    drawn = generator.multinomial(len(totals), np.full(len(totals), 1 / len(totals)), size=samples)
    low, high = np.percentile(drawn @ totals / (drawn @ sizes), [2.5, 97.5])
    return float(totals.sum() / sizes.sum()), float(low), float(high)


def score_interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean score: Wilson's where each is 0 or 1, else the normal one; (0, 1) of a single score."""
    if all(score in (0.0, 1.0) for score in scores):
        return wilson_interval(round(math.fsum(scores)), len(scores))
    if len(scores) < 2:
        return 0.0, 1.0
    mean, reach = float(np.mean(scores)), 1.96 * float(np.std(scores, ddof=1)) / math.sqrt(len(scores))
    return mean - reach, mean + reach


def ratio_interval(
    tasks: Sequence[tuple[Sequence[float], Sequence[float], float]], rng: random.Random, samples: int = 2000
) -> tuple[float, float] | None:
    """95 % percentile interval of the mean over tasks of (pruned - chance) / (dense - chance) [ours].

    tasks: (pruned scores, dense scores, chance) of each, item by item; items are resampled within a task, pruned and
    dense together, as they are the same questions. With chance 0 this is retention / 100, with one task skill. None
    without tasks, or where a resample's dense is at chance: then the ratio is not known.
    """
    generator, total = np.random.default_rng(rng.getrandbits(64)), np.zeros(samples)
    for pruned, dense, chance in tasks:
        kinds, counts = np.unique(np.array([pruned, dense], dtype=float), axis=1, return_counts=True)
        drawn = generator.multinomial(counts.sum(), counts / counts.sum(), size=samples) / counts.sum()
        above, below = drawn @ kinds[0] - chance, drawn @ kinds[1] - chance
        if (below <= 0).any():
            return None
        total += above / below / len(tasks)
    ends: list[float] = np.percentile(total, [2.5, 97.5]).tolist()
    return (ends[0], ends[1]) if tasks else None
