"""One small MLP per block (the paper's `local` router)."""

from __future__ import annotations

from torch import Tensor, nn

from ftp_lightning.routing.base import RoutingContext, check_made_for
from ftp_lightning.routing.learned import FACTORS, LearnedRouter, at_least_one, factors, two_layers


class LocalRouter(LearnedRouter):
    """p_compute = softmax(MLP_l(factors))[compute], one MLP per block (paper, Table 4): N times 450 parameters.

    Args: num_blocks, the N blocks of the model; the others as for `LearnedRouter`.
    """

    def __init__(self, num_blocks: int, width: int = 64, names: tuple[str, ...] = FACTORS):
        super().__init__(width, names)
        self.num_blocks = at_least_one("num_blocks", num_blocks)
        self.mlps = nn.ModuleList(two_layers(len(self.names), self.width) for _ in range(self.num_blocks))

    def logits(self, context: RoutingContext) -> Tensor:
        return self.mlps[context.block](factors(context, self.names))

    def check_model(self, num_blocks: int, hidden_size: int) -> None:
        check_made_for("blocks", self.num_blocks, num_blocks)

    def config(self) -> dict:
        return {"num_blocks": self.num_blocks, **super().config()}
