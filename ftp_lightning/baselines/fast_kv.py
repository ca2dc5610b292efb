"""FastKV: tokens selected once, the others go no further."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ftp_lightning.baselines.peer import Peer, from_block
from ftp_lightning.baselines.selectors import AttentionSelector, pooled
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.routing import Router
from ftp_lightning.routing.base import RoutingContext
from ftp_lightning.schedule import Schedule


class PropagatedSelector(AttentionSelector):
    """Score = the attention before the first routed block, averaged over 7 neighbours; of all later blocks the same."""

    once = True
    POOL = 7

    def score(self, context: RoutingContext) -> Tensor:
        if self not in context.memo:
            context.memo[self] = pooled(context.attention, context.real, self.POOL)
        return context.memo[self]


class FastKV(Peer):
    """FastKV (Jo et al. 2025, arXiv 2502.01068), its token-selective propagation: after one block the tokens that the
    last 8 attend to most, pooled over 7 neighbours, go on; the others take part in no later block.

    Adapted: the block is the latest one, up to the middle of the model, from which at most 80 % need to be dropped (the
    paper: the middle, 20 % go on); an earlier one where the budget wants more. The blocks before keep all their keys:
    FastKV thins that cache too, which saves no prefill FLOPs and is a method of its own.
    """

    name, title, paper = "fast_kv", "FastKV (selected once)", "FastKV, arXiv 2502.01068"
    window, most = 8, 0.8

    def tries(self, setting: Setting) -> Iterator[tuple[Router, Schedule]]:
        for first in range(max(1, setting.blocks // 2), 0, -1):
            yield PropagatedSelector(), from_block(setting.blocks, first)
