"""The paper's dynamic router: a small MLP on four factors, one for all blocks."""

from __future__ import annotations

from ftp_lightning.routing.learned import FACTORS, LearnedRouter, two_layers


class DynamicRouter(LearnedRouter):
    """p_compute = softmax(MLP(factors))[compute], MLP 4 -> 64 -> 2 with ReLU (paper, Section 4.3): 450 parameters.

    One router serves all blocks (`global`): what differs from block to block reaches it through the factors alone.

    Args: see `LearnedRouter`.
    """

    def __init__(self, width: int = 64, names: tuple[str, ...] = FACTORS):
        super().__init__(width, names)
        self.mlp = two_layers(len(self.names), self.width)
