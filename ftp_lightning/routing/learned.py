"""What the trained routers see and share: the paper's four factors, two layers, a softmax in float32."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ftp_lightning.routing.base import Needs, Router, RoutingContext

FACTORS = ("position", "attention", "rank", "sparsity")
TIE = 1e-6
"""Scores closer than this share a rank, so that rounding noise does not decide."""
FLOAT32 = {"dtype": torch.float32}
"""Of a router's weights, whatever `torch.set_default_dtype` says."""


class LearnedRouter(Router):
    """p_compute = softmax(logits)[compute]. The state is float32 whatever the model's dtype.

    Args:
        width: units of the hidden layer.
        names: the factors it sees, a subset of FACTORS (the paper's Table 5 removes some); None: none at all.

    Raises:
        ValueError: a width below 1, or factors that are unknown, named twice, or an empty list.
    """

    more = Needs()
    """What it looks at besides its factors."""
    mlp: nn.Module
    """What makes the logits from the factors, where a router has nothing else to look at."""

    def __init__(self, width: int, names: tuple[str, ...] | None):
        super().__init__()
        self.width, self.names = at_least_one("width", width), () if names is None else known_factors(names)

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # here the factors say it
        return replace(self.more, attention=read_attention(self.names))

    def logits(self, context: RoutingContext) -> Tensor:
        """(B, T, 2) float32: skip, compute."""
        return self.mlp(factors(context, self.names))

    def score(self, context: RoutingContext) -> Tensor:
        """(B, T) p_compute, in float32 also under autocast: bfloat16 has too few values to rank tokens by."""
        with torch.autocast(context.real.device.type, enabled=False):
            return self.logits(context).softmax(dim=-1)[..., 1]

    def config(self) -> dict:
        return {"width": self.width} | ({"names": list(self.names)} if self.names else {})


def two_layers(inputs: int, width: int) -> nn.Sequential:
    """MLP inputs -> width -> 2 with ReLU: (inputs + 1) * width + 2 * width + 2 parameters."""
    return nn.Sequential(nn.Linear(inputs, width, **FLOAT32), nn.ReLU(), nn.Linear(width, 2, **FLOAT32))


def factors(context: RoutingContext, names: tuple[str, ...] = FACTORS) -> Tensor:
    """The factors of the paper's router (Section 4.3), (B, T, len(names)) float32; padding holds zeros, so that nothing
    undefined reaches the router.

    position: i / (T-1) with T the row's real length; a single token has 1, as has every continuation token.
    attention: log1p of the latest attention score, which is 1 under uniform attention [ours: the paper does not scale].
    rank: the score's ascending rank among the row's real tokens, over n-1: in [0, 1], ties averaged; at decode it comes
        with the context, where each token ranks among those up to itself.
    sparsity: the schedule's requirement s_l, the same for every token.
    """
    columns, memo = [], context.memo
    for name in names:
        if name == "position":
            if name not in memo:  # the same in all blocks
                last = (context.lengths - 1).to(torch.float32)
                fraction = context.position.to(torch.float32) / last.clamp(min=1)
                memo[name] = torch.where(last > 0, fraction, torch.ones_like(fraction))
            columns.append(memo[name])
        elif name == "attention":
            columns.append(torch.log1p(context.attention))
        elif name == "rank" and context.rank is not None:
            columns.append(context.rank)
        elif name == "rank":
            rank = average_rank(context.attention, context.real if context.padded else None)
            columns.append(rank / (context.lengths - 1).clamp(min=1).to(torch.float32))
        else:
            columns.append(torch.full_like(context.position, context.sparsity, dtype=torch.float32))
    stacked = torch.stack(columns, dim=-1)
    return stacked.masked_fill(~context.real[..., None], 0.0) if context.padded else stacked


def average_rank(values: Tensor, real: Tensor | None) -> Tensor:
    """Ascending ranks 0 .. n-1 of the real entries of each row; neighbours within TIE share the mean of their ranks.

    Args: values (B, T) float; real (B, T) bool, None = all. Returns (B, T) float32; entries of padding are
    meaningless.
    """
    values = values if real is None else values.masked_fill(~real, torch.inf)
    ordered, order = values.sort(dim=1, stable=True)
    step = ordered.diff(dim=1) > TIE  # inf - inf is nan, and nan > TIE is False: padding forms one group at the end
    group = torch.cat([torch.zeros_like(order[:, :1]), step.to(order.dtype).cumsum(1)], dim=1)
    index = torch.arange(values.shape[1], device=values.device, dtype=torch.float32).expand_as(values)
    total = torch.zeros_like(index).scatter_add(1, group, index)
    members = torch.zeros_like(index).scatter_add(1, group, torch.ones_like(index))
    mean = (total / members.clamp(min=1)).gather(1, group)
    return torch.empty_like(index).scatter(1, order, mean)


def read_attention(names: tuple[str, ...]) -> bool:
    """Whether any of these factors comes from the attention table."""
    return "attention" in names or "rank" in names


def known_factors(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names as a tuple. ValueError for unknown ones, one named twice, or none."""
    names = tuple(names)
    unknown = [name for name in names if name not in FACTORS]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"unknown factors {unknown} in {list(names)}; choose at least one of {', '.join(FACTORS)}, each once"
        )
    return names


def at_least_one(name: str, value: int) -> int:
    if int(value) < 1:
        raise ValueError(f"{name} of a router must be at least 1, got {value}")
    return int(value)
