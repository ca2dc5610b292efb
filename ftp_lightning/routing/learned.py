"""What the trained routers share: two layers, factors by name, a softmax in float32."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ftp_lightning.routing.base import Needs, Router, RoutingContext
from ftp_lightning.routing.factors import FACTORS, read_attention


def two_layers(inputs: int, width: int) -> nn.Sequential:
    """MLP inputs -> width -> 2 with ReLU: (inputs + 1) * width + 2 * width + 2 parameters."""
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 2))


class LearnedRouter(Router):
    """p_compute = softmax(logits)[compute]. The state is float32 whatever the model's dtype.

    Args:
        width: units of the hidden layer.
        names: the factors it sees, a subset of `factors.FACTORS` (the paper's Table 5 removes some); None: none at
            all.

    Raises:
        ValueError: a width below 1, or factors that are unknown, named twice, or an empty list.
    """

    more = Needs()
    """What it looks at besides its factors."""

    def __init__(self, width: int, names: tuple[str, ...] | None):
        super().__init__()
        self.width, self.names = at_least_one("width", width), () if names is None else known_factors(names)

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # here the factors say it
        return replace(self.more, attention=read_attention(self.names))

    def logits(self, context: RoutingContext) -> Tensor:
        """(B, T, 2) float32: skip, compute."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it scores tokens")

    def score(self, context: RoutingContext) -> Tensor:
        """(B, T) p_compute, in float32 also under autocast: bfloat16 has too few values to rank tokens by."""
        with torch.autocast(context.real.device.type, enabled=False):
            return self.logits(context).softmax(dim=-1)[..., 1]

    def config(self) -> dict:
        return {"width": self.width} | ({"names": list(self.names)} if self.names else {})


def at_least_one(name: str, value: int) -> int:
    if int(value) < 1:
        raise ValueError(f"{name} of a router must be at least 1, got {value}")
    return int(value)


def known_factors(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names as a tuple. ValueError for unknown ones, one named twice, or none."""
    names = tuple(names)
    unknown = [name for name in names if name not in FACTORS]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"unknown factors {unknown} in {list(names)}; choose at least one of {', '.join(FACTORS)}, each once"
        )
    return names
