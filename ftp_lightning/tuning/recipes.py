"""Recipes: ways to a family of pruners of rising FLOPs cut. One recipe = one router, one compensation, many schedules.

To add one, write a `Recipe` and put it into `RECIPES`; `tune` compares all of them on its choice prompts. What a recipe
trains it trains in `fit`, on the ground's rows, which are in no other part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ftp_lightning.attention_score import AttentionScore
from ftp_lightning.costs.budget import OutOfReach, default_with_cut, late_with_cut, stages_with_cut
from ftp_lightning.costs.request import planned_cut
from ftp_lightning.data.rows import Batch, Rows
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.family import find_decoder
from ftp_lightning.routing import Router, StaticRouter, UntrainedRouter
from ftp_lightning.schedule import Schedule
from ftp_lightning.training.compensation import Compensation, fit_compensation

RANK = 64
"""Rank of a fitted compensation [ours]: 4.5 MB for 30 blocks of 576, stored in bfloat16."""
DISTILLED_CUT = 0.3
"""The cut for which a compensation is distilled [ours], or the largest smaller one: all cuts of a family share it."""
BATCH = 8
"""Prompts per forward of a fit [ours]."""
CHECKED = 3
"""Of so many fit prompts one chooses the best epoch of a distillation [ours]."""
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
        folder: where a recipe may keep what it has trained, to go on after a kill; None keeps nothing.
        memo: what several recipes share, found once.
        between: called between the batches of a fit; what it raises ends the fit.
    """

    model: Any
    rows: Rows
    length: int
    seed: int = 0
    folder: Path | None = None
    memo: dict[Any, Any] = field(default_factory=dict)
    between: Callable[[], None] = lambda: None

    @property
    def blocks(self) -> int:
        return len(find_decoder(self.model)[1])

    def batches(self) -> Iterator[Batch]:
        """The rows, `BATCH` at a time."""
        for _, batch in self.rows.batches(BATCH):
            self.between()
            yield batch


@dataclass(frozen=True)
class Recipe:
    """A named way to a family.

    Attributes:
        name: in tables and in tune.json.
        fit: router, compensation and settings, under any schedule; whatever is trained is trained here, once.
        schedules: the schedules that make these FLOPs cuts, in ascending order and as many as are within reach; each
            says its kv modes.
        identity: JSON-able, what else `fit` depends on than the ground and this package's code. What was fitted is
            taken from disk where name and identity are the same.
    """

    name: str
    fit: Callable[[Ground], TokenPruner]
    schedules: Callable[[Ground, TokenPruner, Sequence[float]], dict[float, Schedule]]
    identity: Any = None


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


def pruner_with(router: Callable[[], Router], rank: int, **more: Any) -> Callable[[Ground], TokenPruner]:
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
        ground.memo["ridge", rank] = fit_compensation(ground.model, ground.batches(), min(rank, width)).rounded()
    return ground.memo["ridge", rank]


def distilled(ground: Ground) -> TokenPruner:
    """Late blocks whose fitted compensation is trained on the KL of the answers (`lit.distillation`)."""
    from ftp_lightning.lit.distillation import DistillationSettings, distil_compensation

    pruner = pruner_with(StaticRouter, RANK)(ground)
    tried = each(late_schedule)(ground, pruner, [share * DISTILLED_CUT for share in (0.25, 0.5, 0.75, 1.0)])
    if not tried:
        return pruner
    pruner = pruner.changed(schedule=list(tried.values())[-1])
    places = range(len(ground.rows))
    teaching = ground.rows.subset(place for place in places if (place + 1) % CHECKED)
    checking = ground.rows.subset(place for place in places if not (place + 1) % CHECKED)
    settings = DistillationSettings(seed=ground.seed)
    found = distil_compensation(ground.model, pruner, teaching, checking, settings, ground.folder, ground.between)
    return pruner.changed(compensation=found.rounded())


def given(pruner: TokenPruner) -> Recipe:
    """The family of a pruner that was found before: its blocks from the last one down, as far as the cut asks for."""
    form, of_any_length = pruner.scheduled, pruner.changed(least_tokens=0)
    routed = [block for block in reversed(range(form.num_blocks)) if form.sparsity[block] > 0.0]

    def member(amount: float) -> Schedule:
        """The last `amount` of the routed blocks as they were, the others dense; in between a part."""
        share = {block: min(1.0, max(0.0, amount - place)) for place, block in enumerate(routed)}
        return Schedule([s * share.get(block, 0.0) for block, s in enumerate(form.sparsity)], pruner.kv, form.seen)

    def schedules(ground: Ground, _: TokenPruner, cuts: Sequence[float]) -> dict[float, Schedule]:
        amounts = list(range(len(routed) + 1))
        tried = (of_any_length.with_schedule(member(amount)) for amount in amounts)
        saved = [planned_cut(ground.model, pruner, ground.length) for pruner in tried]
        return {cut: member(float(np.interp(cut, saved, amounts))) for cut in cuts if cut <= saved[-1]}

    return Recipe("given", lambda ground: of_any_length, schedules, of_any_length.identity())


def _by_attention() -> UntrainedRouter:
    return UntrainedRouter(("rank",))


_LAST_EIGHT = AttentionScore(window=8, pooling="average", kernel_size=7)

RECIPES: tuple[Recipe, ...] = (
    Recipe("late blocks, fitted", pruner_with(StaticRouter, RANK), each(late_schedule)),
    Recipe("late blocks, distilled", distilled, each(late_schedule)),
    Recipe("stages, fitted", pruner_with(_by_attention, RANK, attention=_LAST_EIGHT), each(stage_schedule)),
    Recipe("default", pruner_with(StaticRouter, 0), each(default_schedule)),
    Recipe("late blocks", pruner_with(StaticRouter, 0), each(late_schedule)),
    Recipe("stages", pruner_with(_by_attention, 0, attention=_LAST_EIGHT), each(stage_schedule)),
    Recipe("default, fitted", pruner_with(StaticRouter, RANK), each(default_schedule)),
)
"""In the order in which they are tried; where time is short the last ones are left out."""
