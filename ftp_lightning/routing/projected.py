"""A router that sees the hidden state through a few numbers, beside the factors: at most 16 in all. [ours]"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ftp_lightning.routing.base import RoutingContext
from ftp_lightning.routing.hidden import HiddenRouter, unit_scale
from ftp_lightning.routing.learned import FACTORS, FLOAT32, LearnedRouter, at_least_one, factors, two_layers


class ProjectedRouter(HiddenRouter):
    """p_compute = softmax(MLP([V x / rms(x), factors]))[compute], V (rank, D) the same for all blocks [ours].

    Why: the paper's four factors hardly say which tokens a later question needs (position and attention tell tokens of
    facts from prose with an AUC of 0.6 at every block of the reference model, its hidden state with 0.92 at the
    first and 0.98 from the third on; docs/routers.md), and the MLP on the whole hidden state has 64 D weights. 12
    directions of it and the four factors are 16 numbers. Parameters: rank * D + (rank + factors + 1) * width
    + 2 * width + 2.

    Args: hidden_size D of the model; rank, the directions; width and names as for `LearnedRouter`.
    """

    def __init__(self, hidden_size: int, rank: int = 12, width: int = 64, names: tuple[str, ...] = FACTORS):
        LearnedRouter.__init__(self, width, names)
        self.hidden_size, self.rank = at_least_one("hidden_size", hidden_size), at_least_one("rank", rank)
        self.directions = nn.Linear(self.hidden_size, self.rank, bias=False, **FLOAT32)
        self.mlp = two_layers(self.rank + len(self.names), self.width)

    def logits(self, context: RoutingContext) -> Tensor:
        seen = self.directions(unit_scale(context.hidden, context.real)), factors(context, self.names)
        return self.mlp(torch.cat(seen, dim=-1))

    def config(self) -> dict:
        return {**super().config(), "rank": self.rank}
