"""Zero-TPrune: a cascade by weighted page rank over the attention graph."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ftp_lightning.baselines.peer import Peer, ever_flatter, steps
from ftp_lightning.baselines.selectors import AttentionSelector, nested
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.pruning.reads import attention_rank
from ftp_lightning.routing import Router
from ftp_lightning.routing.base import Needs, RoutingContext
from ftp_lightning.schedule import Schedule


class PageRankSelector(AttentionSelector):
    """Score = page rank in the attention graph of the block before, over that of uniform attention; a cascade."""

    needs = Needs(attention=True, reads=attention_rank)

    def score(self, context: RoutingContext) -> Tensor:
        return nested(context.attention, context)


class ZeroTPrune(Peer):
    """Zero-TPrune (Wang et al. 2024, arXiv 2305.17328): a token matters if tokens that matter attend to it.

    Adapted to causal attention: see `pruning.reads.attention_rank` (damping, five iterations, over what uniform
    attention gives); heads are averaged, where the paper weighs and filters them; its second stage, pruning among
    similar tokens, is left out. The steps are those of LazyLLM here, so that the two differ in the selector alone.
    """

    name, title, paper = "zero_tprune", "Zero-TPrune (page rank, cascade)", "Zero-TPrune, arXiv 2305.17328"
    most = 0.8

    def tries(self, setting: Setting) -> Iterator[tuple[Router, Schedule]]:
        for form in ever_flatter(steps(setting.blocks)):
            yield PageRankSelector(), form
