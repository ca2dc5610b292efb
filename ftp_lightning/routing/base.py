"""What a router is, and what it may look at.

Shapes, here and everywhere: B rows of a batch, T tokens of the routed part, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RoutingContext:
    """All that is known when the tokens of one block are routed.

    Attributes:
        block: index of the block, from 0.
        sparsity: the schedule's requirement s_l for this block.
        real: (B, T) bool, False for padding.
        position: (B, T) int64, index of the token among the row's real tokens (arbitrary on padding).
        lengths: (B, 1) int64, real tokens of each row.
        kept: (B, 1) int64, tokens of each row that the schedule lets in (`schedule.kept_tokens`).
        attention: (B, T) float32, the table of latest attention scores; None unless the router `needs_attention`.
        hidden: (B, T, D), the block's input.
    """

    block: int
    sparsity: float
    real: Tensor
    position: Tensor
    lengths: Tensor
    kept: Tensor
    attention: Tensor | None = None
    hidden: Tensor | None = None


class Router(nn.Module):
    """Gives each token of a block a score; high = compute.

    A router says what it needs and scores; how many tokens enter is `routing.choice`'s business. `score` ranks the
    tokens (choice `topk`), `probability` is p_compute (choice `threshold`, the losses).
    """

    needs_attention = False

    def score(self, context: RoutingContext) -> Tensor:
        """(B, T) float32, the higher the sooner computed. Values on padding are ignored."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it scores tokens")

    def probability(self, context: RoutingContext) -> Tensor:
        """(B, T) float32 p_compute in [0, 1]."""
        return self.score(context)

    def config(self) -> dict:
        """JSON-able arguments that rebuild the router (its weights are stored apart)."""
        return {}

    def forward(self, context: RoutingContext) -> Tensor:
        return self.score(context)

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def as_float(x: Tensor) -> Tensor:
    """Scores are float32 whatever the model's dtype: ranks must not depend on it."""
    return x.to(torch.float32)
