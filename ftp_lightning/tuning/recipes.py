"""Recipes: ways to a family of pruners of rising FLOPs cut. One recipe = one router, one compensation, many schedules.

To add one, write a `Recipe` and put it into `RECIPES`; `tune` compares all of them on its choice prompts. What a recipe
trains it trains in `fit`, on the ground's rows, which are in no other part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftp_lightning.attention_score import AttentionScore
from ftp_lightning.costs.budget import OutOfReach, default_with_cut, late_with_cut, stages_with_cut
from ftp_lightning.data.rows import Rows
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.family import find_decoder
from ftp_lightning.routing import Router, StaticRouter, UntrainedRouter
from ftp_lightning.schedule import Schedule
from ftp_lightning.training.compensation import Compensation, fit_compensation

RANK = 32
"""Rank of a fitted compensation [ours]: 4.5 MB for 30 blocks of 576."""
STAGE = 0.9
"""Share of the tokens that skip the second stage [ours]."""


@dataclass(frozen=True)
class Ground:
    """What a recipe may look at.

    Attributes:
        model: in eval mode, nothing attached.
        rows: the fit prompts with the dense model's own answers.
        length: tokens of a typical prompt, for which cuts are planned.
        seed: of everything random.
        memo: what several recipes share, found once.
    """

    model: Any
    rows: Rows
    length: int
    seed: int = 0
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return len(find_decoder(self.model)[1])


@dataclass(frozen=True)
class Recipe:
    """A named way to a family.

    Attributes:
        name: in tables and in tune.json.
        fit: router, compensation and settings, under any schedule; whatever is trained is trained here, once.
        schedules: the schedules that make these FLOPs cuts, in ascending order and as many as are within reach; each
            says its kv modes.
    """

    name: str
    fit: Callable[[Ground], TokenPruner]
    schedules: Callable[[Ground, TokenPruner, Sequence[float]], dict[float, Schedule]]


def each(
    schedule: Callable[[Ground, float], Schedule],
) -> Callable[[Ground, TokenPruner, Sequence[float]], dict[float, Schedule]]:
    """`Recipe.schedules` of a rule that places one cut at a time."""

    def family(ground: Ground, pruner: TokenPruner, cuts: Sequence[float]) -> dict[float, Schedule]:
        found: dict[float, Schedule] = {}
        for cut in cuts:
            try:
                found[cut] = schedule(ground, cut)
            except OutOfReach:
                break
        return found

    return family


def default_schedule(ground: Ground, cut: float) -> Schedule:
    """`Schedule.default` with this cut."""
    return default_with_cut(ground.model, cut, ground.length, None)


def late_schedule(ground: Ground, cut: float) -> Schedule:
    """The last blocks are skipped by all tokens but the first and the last (POP, arXiv 2602.03295)."""
    return late_with_cut(ground.model, cut, ground.length)


def stage_schedule(ground: Ground, cut: float) -> Schedule:
    """The first blocks are dense, the others skip nine tokens in ten, keys and values kept."""
    return stages_with_cut(ground.model, cut, ground.length, STAGE)


def _pruner(router: Callable[[], Router], rank: int, **more: Any) -> Callable[[Ground], TokenPruner]:
    """`Recipe.fit` with this router and, where the rank is not 0, a fitted compensation."""

    def fit(ground: Ground) -> TokenPruner:
        about = dict(more)
        if rank:
            about |= {"skip": "low-rank", "compensation": fitted(ground, rank)}
        return TokenPruner(router(), Schedule.uniform(ground.blocks, 0.0), **about)

    return fit


def fitted(ground: Ground, rank: int) -> Compensation:
    """The ridge regression of this rank on the ground's rows, fitted once."""
    if ("ridge", rank) not in ground.memo:
        width = ground.model.config.get_text_config().hidden_size
        ground.memo["ridge", rank] = fit_compensation(ground.model, ground.rows, min(rank, width))
    return ground.memo["ridge", rank]


def _by_attention() -> UntrainedRouter:
    return UntrainedRouter(("rank",))


_LAST_EIGHT = AttentionScore(window=8, pooling="average", kernel_size=7)

RECIPES: tuple[Recipe, ...] = (
    Recipe("late blocks, fitted", _pruner(StaticRouter, RANK), each(late_schedule)),
    Recipe("stages, fitted", _pruner(_by_attention, RANK, attention=_LAST_EIGHT), each(stage_schedule)),
    Recipe("default", _pruner(StaticRouter, 0), each(default_schedule)),
    Recipe("late blocks", _pruner(StaticRouter, 0), each(late_schedule)),
    Recipe("stages", _pruner(_by_attention, 0, attention=_LAST_EIGHT), each(stage_schedule)),
    Recipe("default, fitted", _pruner(StaticRouter, RANK), each(default_schedule)),
)
"""In the order in which they are tried; where time is short the last ones are left out."""
