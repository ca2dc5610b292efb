"""One ranking of the prompt for all blocks, from the hidden state in front of the first routed one. [ours]"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ftp_lightning.errors import UserError
from ftp_lightning.routing.base import Needs, RoutingContext
from ftp_lightning.routing.learned import factors
from ftp_lightning.routing.projected import ProjectedRouter

SEEN = ("position", "attention", "rank")
"""The factors that are a token's own; the block's sparsity says how many tokens enter, not which."""


class ProjectedOnceRouter(ProjectedRouter):
    """p_l = sigmoid(e + log((1 - s_l) / s_l)), e = 4 (position - 1/2) + MLP([V x / rms(x), factors]), x the first
    routed block's input.

    Tokens are ranked by the evidence e, the same in all blocks, so decisions are nested: what enters a block enters
    every block of less sparsity. Why: under `evict` a token that one block skips is stale in the next one and missing
    as a key in this one, so a token that is kept in turns costs what a whole one costs and gives little [ours,
    docs/routers.md]. 1 - s_l are the prior odds that a token enters block l: with e = 0 the expected sparsity is the
    schedule's. The MLP's last layer starts near 0, so that an untrained router ranks as the static one does, by
    recency, and training starts from what that loses [ours: from a random order it did not find its way at 60 %].
    Nothing is read from the attention of later blocks, and the MLP runs once per forward.

    Args: as for `ProjectedRouter`; names without "sparsity", which is not a token's own. Parameters: the same sum.
    """

    more = Needs(hidden=True, once="at first")
    LEAST = 1e-3
    """Sparsities are cut off here, and as far below 1: odds are finite."""
    RECENCY, START = 4.0, 1e-2
    """Evidence of the last token over the first one's, by position alone; scale of the last layer's first weights."""

    def __init__(self, hidden_size: int, rank: int = 12, width: int = 64, names: tuple[str, ...] = SEEN):
        if "sparsity" in names:
            raise UserError(
                f"projected_once ranks once for all blocks: leave sparsity out of the factors {list(names)}."
            )
        super().__init__(hidden_size, rank, width, names)
        with torch.no_grad():
            self.mlp[-1].weight.mul_(self.START)
            self.mlp[-1].bias.zero_()

    def score(self, context: RoutingContext) -> Tensor:
        """(B, T) evidence e, read from the memo of the forward behind the first routed block."""
        memo = context.memo.setdefault(self, {})
        if torch.is_grad_enabled() not in memo:
            with torch.autocast(context.real.device.type, enabled=False):
                skip, compute = self.logits(context).unbind(dim=-1)
                recency = self.RECENCY * (factors(context, ("position",))[..., 0] - 0.5)
                memo[torch.is_grad_enabled()] = recency + compute - skip
        return memo[torch.is_grad_enabled()]

    def probability(self, context: RoutingContext) -> Tensor:
        """(B, T) p_compute of this block."""
        sparsity = min(max(context.sparsity, self.LEAST), 1.0 - self.LEAST)
        return torch.sigmoid(self.score(context) + math.log((1.0 - sparsity) / sparsity))
