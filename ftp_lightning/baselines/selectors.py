"""Selectors that several peers share. Shapes: B rows, T tokens of the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from ftp_lightning.routing.base import Needs, Router, RoutingContext
from ftp_lightning.routing.learned import average_rank


class AttentionSelector(Router):
    """Score = the attention that a token received last, as the pruner's `window` or `needs.reads` says."""

    needs, ranks_only = Needs(attention=True), True

    def score(self, context: RoutingContext) -> Tensor:
        return context.attention


class ScoutedSelector(Router):
    """Score = what the dense look said: the same order, hence under one sparsity the same tokens, in every block."""

    ranks_only = True

    def score(self, context: RoutingContext) -> Tensor:
        return context.scouted


def nested(score: Tensor, context: RoutingContext) -> Tensor:
    """Scores under which tokens that entered the block before come first, each group in the order of `score`: a
    cascade wherever sparsity does not fall; where it falls, the best of those dropped come back. (B, T) float32."""
    rank = average_rank(score, context.real if context.padded else None)
    rank = rank / context.lengths.clamp(min=1)
    return rank if context.entered is None else rank + 2.0 * context.entered


def pooled(score: Tensor, real: Tensor, width: int) -> Tensor:
    """Mean of the `width` neighbours around each token (fewer at the ends), padding left out. (B, T) float32."""
    total, count = (
        torch.nn.functional.avg_pool1d(x[:, None], width, 1, width // 2)[:, 0] for x in (score * real, real.float())
    )
    return total / count.clamp(min=torch.finfo(torch.float32).tiny)
