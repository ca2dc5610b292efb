"""FastKV: tokens selected once, the others go no further."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ftp_lightning.baselines.peer import Peer, from_block
from ftp_lightning.baselines.selectors import AttentionSelector, pooled
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.routing import Router
from ftp_lightning.routing.base import Needs, RoutingContext
from ftp_lightning.schedule import Schedule


class PropagatedSelector(AttentionSelector):
    """The last 8 tokens first, then by the attention before the first routed block, averaged over 7 neighbours among
    the others; the same in all later blocks."""

    needs = Needs(attention=True, once="at first")
    WINDOW, POOL, FIRST = 8, 7, 1e9  # finite: training takes differences of scores

    def score(self, context: RoutingContext) -> Tensor:
        if self not in context.memo:
            asking = context.position >= context.lengths - self.WINDOW
            others = pooled(context.attention, context.real & ~asking, self.POOL)
            context.memo[self] = others.masked_fill(asking, self.FIRST)
        return context.memo[self]


class FastKV(Peer):
    """FastKV (Jo et al. 2025, arXiv 2502.01068), its token-selective propagation: after one block the tokens that the
    last 8 attend to most, pooled over 7 neighbours, go on with these 8; the others take part in no later block.

    Adapted: the block is the latest one, up to the middle of the model, from which at most 80 % need to be dropped (the
    paper: the middle, 20 % go on); an earlier one where the budget wants more. The blocks before keep all their keys:
    FastKV thins that cache too, which saves no prefill FLOPs and is a method of its own.
    """

    name, title, paper = "fast_kv", "FastKV (selected once)", "FastKV, arXiv 2502.01068"
    window, most = PropagatedSelector.WINDOW, 0.8

    def tries(self, setting: Setting) -> Iterator[tuple[Router, Schedule]]:
        for first in range(max(1, setting.blocks // 2), 0, -1):
            yield PropagatedSelector(), from_block(setting.blocks, first)
