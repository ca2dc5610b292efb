"""SpAtten: a cascade by all the attention received so far."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ftp_lightning.baselines.peer import Peer, ever_flatter, ramp
from ftp_lightning.baselines.selectors import AttentionSelector, nested
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.pruning.reads import attention_sums
from ftp_lightning.routing import Router
from ftp_lightning.routing.base import Needs, RoutingContext
from ftp_lightning.schedule import Schedule


class CumulativeSelector(AttentionSelector):
    """Score = sum over the blocks so far, their queries and (mean) heads of the attention received; dropped tokens stay
    dropped."""

    needs = Needs(attention=True, adds_up=True, reads=attention_sums)

    def score(self, context: RoutingContext) -> Tensor:
        return nested(context.attention, context)


class SpAtten(Peer):
    """SpAtten (Wang et al. 2021, arXiv 2012.09852), its cascade token pruning: importance is the attention probability
    that a token received, added up over heads, queries and layers; what is pruned is pruned in all later layers.

    Adapted: the share pruned rises evenly with depth from a dense first block (SpAtten's are found per task), less
    steeply where the budget would take more than 80 % of a block. Head
    pruning, local value pruning and quantisation are left out, and no importance is gathered while generating. In a
    causal model early tokens are seen by more queries and lead for that; SpAtten does not correct it, nor do we.
    """

    name, title, paper = "spatten", "SpAtten (cumulative attention, cascade)", "SpAtten, arXiv 2012.09852"
    most = 0.8

    def tries(self, setting: Setting) -> Iterator[tuple[Router, Schedule]]:
        for form in ever_flatter(ramp(setting.blocks)):
            yield CumulativeSelector(), form
