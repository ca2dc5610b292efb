"""How far a mean over clustered items may be off: variances over documents and seeds, with Student's t."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Z = float(stats.norm.ppf(0.975))
Labels = Sequence[Hashable] | None


@dataclass(frozen=True)
class Spread:
    """How far the mean of some items may be off: `reach` is half of the 95 % interval, `quantile` the largest t in it,
    `distinct` the number of items that are not repeats of others under another seed, `mixed` the documents that hold
    a 0, or those that hold a 1, whichever are fewer."""

    reach: float
    quantile: float
    distinct: float
    clusters: int
    seeds: int
    independent: bool = False
    mixed: int = 0
    note: str = ""

    def floor(self, one: Any, two: Any) -> float:
        """The reach of independent 0/1 pairs (Agresti and Min); with the t quantile where none has changed, as then
        nothing shows how documents differ."""
        n, scale = self.distinct + 2, self.distinct / len(one)
        gained, lost = scale * float((one > two).sum()), scale * float((one < two).sum())
        quantile = Z if gained + lost else self.quantile
        return quantile * math.sqrt(max(gained + lost + 1 - (gained - lost) ** 2 / n, 0.0)) / n


def spread_of(data: Any, documents: Labels, seeds: Labels) -> Spread:
    """The variance over documents, over seeds, and over both, each with its t quantile; the widest counts.

    Where the same documents come back under every seed (crossed) both add up: V = V_seeds + V_documents - V_cells, a
    cell being one document under one seed (Cameron, Gelbach and Miller 2011), with degrees of freedom by Welch and
    Satterthwaite. Where each seed has documents of its own the formula is that of the seeds alone.
    """
    n = len(data)
    seed = np.zeros(n, dtype=int) if seeds is None else _codes(seeds, n)
    document = np.arange(n) if documents is None else _codes(documents, n)
    clusters, several = (int(codes.max()) + 1 if n else 0 for codes in (document, seed))
    if clusters < 2:
        note = "one document: no interval" if clusters else "no items"
        return Spread(math.inf, math.inf, n, clusters, several, note=note)
    if not np.isfinite(data).all():
        return Spread(math.inf, math.inf, n, clusters, several, note="an item is not finite: no interval")
    variance, df = jackknife(data, document)
    quantile = t_quantile(df)
    reach, distinct = quantile * math.sqrt(variance), float(n)
    if several > 1:
        cell = _codes((document * several + seed).tolist(), n)
        distinct = n * clusters / (int(cell.max()) + 1)
        inside, _ = jackknife(data, cell)
        between, seed_df = jackknife(data, seed)
        total = max(between + variance - inside, 0.0)
        both_df = (between + variance) ** 2 / (between**2 / seed_df + variance**2 / df) if between + variance else df
        quantile = max(quantile, t_quantile(seed_df))
        reach = max(reach, t_quantile(seed_df) * math.sqrt(between), t_quantile(both_df) * math.sqrt(total))
    independent = several == 1 and clusters == n
    mixed = min(len(np.unique(document[data == end])) for end in (0.0, 1.0))
    return Spread(reach, quantile, distinct, clusters, several, independent, mixed)


def _codes(labels: Sequence[Hashable], n: int) -> Any:
    """Labels as 0, 1, 2 ... in the order of their first appearance."""
    if len(labels) != n:
        raise ValueError(f"{n} items and {len(labels)} labels")
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(label, len(known)) for label in labels], dtype=int)


def jackknife(data: Any, codes: Any) -> tuple[float, float]:
    """Variance of the mean of `data` when clusters are left out one at a time, and its degrees of freedom.

    V = (G - 1)/G sum_c (mean without c - mean)^2. The degrees of freedom are Satterthwaite's, for cluster means that
    vary alike: G - 1 for clusters of equal size, fewer where some hold most items.
    """
    sizes, totals = np.bincount(codes), np.bincount(codes, weights=data)
    n, share, clusters = len(data), np.bincount(codes) / len(data), len(sizes)
    without = (data.sum() - totals) / (n - sizes)
    variance = (clusters - 1) / clusters * float(((without - data.mean()) ** 2).sum())
    # V = sum_c d_c (mean_c - mean)^2 with these weights; 2 E(V)^2 / Var(V) in closed form.
    weight, square = (share / (1 - share)) ** 2, float((share**2).sum())
    own = 1 + square - 2 * share
    zero, one, two = (float((weight * share**power).sum()) for power in (0, 1, 2))
    crossed = square**2 * zero**2 + 2 * zero * two + 2 * one**2 - 4 * square * zero * one
    trace = crossed + float((weight**2 * (own**2 - (square - 2 * share) ** 2)).sum())
    return variance, float((weight * own).sum()) ** 2 / trace


def t_quantile(df: float) -> float:
    """Student's t for a two-sided 95 % interval."""
    return float(stats.t.ppf(0.975, df))
