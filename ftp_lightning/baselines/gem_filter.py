"""GemFilter: early blocks choose the tokens, a second pass runs on these alone."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ftp_lightning.baselines.peer import Peer, even
from ftp_lightning.baselines.selectors import ScoutedSelector, pooled
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.pruning.reads import last_logits
from ftp_lightning.routing import Router
from ftp_lightning.routing.base import Needs, RoutingContext, Scout
from ftp_lightning.schedule import Schedule


class GemFilterSelector(ScoutedSelector):
    """Score = q k_j of the last token in block `blocks` - 1 of a dense look, averaged over heads and 5 neighbours."""

    POOL = 5

    def __init__(self, blocks: int):
        super().__init__()
        self.blocks = blocks
        self.needs = Needs(reads=last_logits, scout=Scout("attention", blocks))

    def config(self) -> dict:
        return {"blocks": self.blocks}

    def score(self, context: RoutingContext) -> Tensor:
        if self not in context.memo:
            context.memo[self] = pooled(context.scouted, context.real, self.POOL)
        return context.memo[self]


class GemFilter(Peer):
    """GemFilter (Shi et al. 2024, arXiv 2409.17422): the first r blocks run on the whole prompt, all tokens but
    those that the last one attends to most are cut out of it, and the model runs from its first block on what is left.

    As in its code, "attends to" is q k before the softmax, added up over heads and pooled over 5 neighbours. Adapted:
    original positions in the second pass (the paper counts anew). The first pass is charged, whole blocks of it. r is
    the largest, up to 0.4 of the depth (the paper: 13 of 32), with which at most 80 % need to be dropped.
    """

    name, title, paper = "gem_filter", "GemFilter (two passes)", "GemFilter, arXiv 2409.17422"
    most = 0.8

    def tries(self, setting: Setting) -> Iterator[tuple[Router, Schedule]]:
        for blocks in range(max(1, round(0.4 * setting.blocks)), 0, -1):
            yield GemFilterSelector(blocks), even(setting.blocks)
