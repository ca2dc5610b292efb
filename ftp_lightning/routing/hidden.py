"""A router that looks at the hidden state, as in Mixture-of-Depths (the paper's `hidden` baseline)."""

from __future__ import annotations

import torch
from torch import Tensor

from ftp_lightning.routing.base import Needs, RoutingContext, check_made_for
from ftp_lightning.routing.learned import LearnedRouter, at_least_one, two_layers


class HiddenRouter(LearnedRouter):
    """p_compute = softmax(MLP(x / rms(x)))[compute], x the block's input; one MLP for all blocks (paper, Table 5).

    [ours] x is scaled to unit root mean square (the paper says nothing on normalisation; its size grows from block to
    block), and is an observation: no gradient flows through it to the routers of the blocks before, as none flows
    through the attention table.

    Args: hidden_size D of the model; width of the hidden layer.
    """

    more = Needs(hidden=True)

    def __init__(self, hidden_size: int, width: int = 64):
        self._make(hidden_size, width, None)

    def _make(self, hidden_size: int, width: int, names: tuple[str, ...] | None) -> None:
        LearnedRouter.__init__(self, width, names)
        self.hidden_size = at_least_one("hidden_size", hidden_size)
        self.mlp = two_layers(self.hidden_size + len(self.names), self.width)

    def logits(self, context: RoutingContext) -> Tensor:
        return self.mlp(unit_scale(context.hidden, context.real))

    def check_model(self, num_blocks: int, hidden_size: int) -> None:
        check_made_for("hidden units", self.hidden_size, hidden_size)

    def config(self) -> dict:
        return {"hidden_size": self.hidden_size, **super().config()}


def unit_scale(hidden: Tensor, real: Tensor) -> Tensor:
    """x / sqrt(mean(x^2)) per token, (B, T, D) float32, without gradient; padding, which may hold anything, is zero."""
    x = hidden.detach().to(torch.float32)
    scale = x.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).masked_fill(~real[..., None], 0.0)
