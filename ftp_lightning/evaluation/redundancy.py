"""Redundant tokens (those a block hardly turns): do they stand at the same positions of every text?

All of it from one table of counts, which batches and processes add up: c_p = how many of n texts have a redundant token
at position p of their prompt. Shapes: (..., P) for counts, any leading axes (thresholds, blocks); P positions. Where a
measure is not defined (one text, no or only redundant tokens) it is NaN.
"""

from __future__ import annotations

from torch import Tensor


def pooled_jaccard(counts: Tensor, texts: int) -> Tensor:
    """sum over pairs of texts of |A and B| / sum over pairs of |A or B|, A and B their sets of redundant positions.

    A ratio of sums (pooled), not the mean of the pairs' ratios: pairs with large sets weigh more, and it follows from
    the counts: sum |A and B| = sum_p c_p (c_p - 1) / 2, and sum |A or B| = (n - 1) sum_p c_p - sum |A and B|. 1 = the
    same positions in every text; for two texts it is their Jaccard index. (..., P) -> (...).
    """
    both = (counts * (counts - 1)).sum(-1) / 2
    return both / ((texts - 1) * counts.sum(-1) - both)


def chance_jaccard(counts: Tensor, texts: int) -> Tensor:
    """What `pooled_jaccard` would be if as many redundant tokens lay anywhere: q^2 / (2 q - q^2), q their share."""
    share = counts.mean(-1) / texts
    return share**2 / (2 * share - share**2)


def explained_by_position(counts: Tensor, texts: int) -> Tensor:
    """Share of the variance of the decision "redundant or not" that the position alone explains, in (-inf, 1].

    Adjusted R^2 of a mean per position: 1 - [W / (nP - P)] / [T / (nP - 1)], with the squares within positions
    W = sum_p c_p (n - c_p) / n and the total T = C (nP - C) / (nP), C = sum_p c_p. Adjusted, so that decisions which
    know nothing of position give 0 on average, however few texts there are. (..., P) -> (...).
    """
    positions = counts.shape[-1]
    decisions, redundant = texts * positions, counts.sum(-1)
    within = (counts * (texts - counts)).sum(-1) / texts / positions  # / (n - 1) below
    total = redundant * (decisions - redundant) / decisions / (decisions - 1)
    return 1 - within / ((texts - 1) * total)


def guessed_from_position(counts: Tensor, texts: int) -> Tensor:
    """Share of decisions guessed right from the position alone: what most of the *other* texts do there.

    Left out of its own vote, a decision cannot give itself away; a tie counts half. (..., P) -> (...).
    """
    return _guessed(counts, texts).mean(-1) if texts > 1 else counts.mean(-1) * float("nan")


def guessed_without_position(counts: Tensor, texts: int) -> Tensor:
    """The same guess where the position is not known: what most of all other decisions are. (..., P) -> (...)."""
    return _guessed(counts.sum(-1), texts * counts.shape[-1])


def _guessed(yes: Tensor, votes: int) -> Tensor:
    """Share of `votes` decisions, `yes` of them true, that agree with the majority of the rest."""
    no = votes - yes
    return (yes * _wins(yes - 1, no) + no * _wins(no - 1, yes)) / votes


def _wins(own: Tensor, other: Tensor) -> Tensor:
    return (own > other).double() + 0.5 * (own == other).double()
