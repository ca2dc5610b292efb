"""The paper's static router: the first token, then the latest ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ftp_lightning.routing.base import Router, RoutingContext


class StaticRouter(Router):
    """Priority order x_0, x_{T-1}, x_{T-2}, ..., x_1 (paper, Section 4.2); keep the first `kept` of it.

    Used to search the first schedule, and as the teacher of the guide loss.
    """

    def score(self, context: RoutingContext) -> Tensor:
        """(B, T): a token's position, and T for the first token; the same tensor in all blocks of a forward."""
        position, score = context.memo.get(self, (None, None))
        if position is not context.position:
            position = context.position
            score = torch.where(position == 0, context.lengths, position).to(torch.float32)
            context.memo[self] = position, score
        return score

    def probability(self, context: RoutingContext) -> Tensor:
        """(B, T): 1 for the first `kept` of the order, else 0."""
        # ranks from the front of the order: x_0 -> 0, x_{T-1} -> 1, ..., x_1 -> T-1
        rank = torch.where(context.position == 0, 0, context.lengths - context.position)
        return (rank < context.kept).to(torch.float32)
