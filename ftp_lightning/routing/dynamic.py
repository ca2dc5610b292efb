"""The paper's dynamic router: a small MLP on four factors, one for all blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ftp_lightning.routing.base import Router, RoutingContext
from ftp_lightning.routing.factors import FACTORS, factors


class DynamicRouter(Router):
    """p_compute = softmax(MLP(factors))[compute], MLP 4 -> 64 -> 2 with ReLU (paper, Section 4.3): 450 parameters.

    One router serves all blocks (`global`): what differs from block to block reaches it through the factors alone.
    The state is float32 whatever the model's dtype.

    Args:
        width: units of the hidden layer.
        names: the factors it sees, a subset of `factors.FACTORS` (the paper's Table 5 removes some).
    """

    def __init__(self, width: int = 64, names: tuple[str, ...] = FACTORS):
        super().__init__()
        unknown = [name for name in names if name not in FACTORS]
        if unknown or not names:
            raise ValueError(f"unknown factors {unknown}; choose at least one of {', '.join(FACTORS)}")
        self.width, self.names = int(width), tuple(names)
        self.mlp = nn.Sequential(nn.Linear(len(self.names), self.width), nn.ReLU(), nn.Linear(self.width, 2))

    @property
    def needs_attention(self) -> bool:
        return "attention" in self.names or "rank" in self.names

    def score(self, context: RoutingContext) -> Tensor:
        """(B, T) p_compute, in float32 also under autocast: bfloat16 has too few values to rank tokens by."""
        with torch.autocast(context.real.device.type, enabled=False):
            return self.mlp(factors(context, self.names)).softmax(dim=-1)[..., 1]

    def config(self) -> dict:
        return {"width": self.width, "names": list(self.names)}
