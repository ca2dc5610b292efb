"""Random tokens, the same in any batch: a hash of seed, block and position."""

from __future__ import annotations

import torch
from torch import Tensor

from ftp_lightning.routing.base import Router, RoutingContext

_MASK = (1 << 31) - 1


class RandomRouter(Router):
    """Score = hash(seed, block, position) in [0, 1) (a baseline of the paper's Table 4).

    [ours] A hash instead of a generator: the decision of a token depends on nothing but seed, block and position, hence
    it is the same in any batch, on any device, and when a chunk is scored token by token.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed = int(seed)

    def score(self, context: RoutingContext) -> Tensor:
        """(B, T) uniform in [0, 1)."""
        return uniform_hash(self.seed, context.block, context.position)

    def probability(self, context: RoutingContext) -> Tensor:
        """(B, T): 1 where the hash exceeds the sparsity, else 0."""
        return (self.score(context) > context.sparsity).to(torch.float32)

    def config(self) -> dict:
        return {"seed": self.seed}


def uniform_hash(seed: int, block: int, position: Tensor) -> Tensor:
    """Pseudo-random float32 in [0, 1) of (seed, block, position), by three rounds of multiply-xorshift on 31 bits.

    Products of two 31-bit numbers fit int64, so every device computes the same integers. 24 bits are kept: exact in
    float32.
    """
    x = position.to(torch.int64) + ((seed * 0x27D4EB2F + block * 0x165667B1 + 0x1B873593) & _MASK)
    for multiplier in (0x45D9F3B, 0x119DE1F3, 0x3C6EF372 | 1):
        x = (x & _MASK) * multiplier & _MASK
        x = x ^ (x >> 15)
    return (x >> 7).to(torch.float32) / float(1 << 24)
