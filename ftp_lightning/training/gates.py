"""Gates of the training forward: how a decision, which is 0 or 1, gets a gradient. Inference knows none of this.

Shapes: B rows, T tokens, P routed ones, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class StraightThrough:
    """The decision of inference forward, d output / d p_compute = block(x) - skip(x) backward (paper: hard gates).

    keys: under `evict` also what others lose with a token's key and value has a gradient, see `key_gates` [ours].
    """

    keys: bool = field(default=False, kw_only=True)

    def relax(self, probability: Tensor) -> Tensor:
        """What tokens are ranked by, and what the gradient goes through: (B, P) from p_compute (B, P)."""
        return probability

    def blend(self, rows: Tensor, base: Tensor, keep: Tensor, gate: Tensor | None) -> Tensor:
        """Output (B, T, D) from what the block computes for a token (`rows`) and what a skipped one gets (`base`).

        keep (B, T): the decision; gate (B, T): `relax` of the routed tokens, 1 for those that are computed whatever the
        router says; None where no router was asked.
        """
        output = torch.where(keep[..., None], rows, base)
        if gate is None:
            return output
        soft = gate - gate.detach()
        return output + (soft[..., None] * (rows - base).detach()).to(output.dtype)


@dataclass(frozen=True)
class Gumbel(StraightThrough):
    """Straight-through, with noise on the decision: y = sigmoid((logit p + g) / temperature), g the difference of two
    Gumbel variables (Jang et al. 2017, two classes); tokens are ranked by y, the gradient goes through it.

    generator: of the noise, on the CPU; the same state gives the same noise on every device.
    """

    temperature: float
    generator: torch.Generator

    def relax(self, probability: Tensor) -> Tensor:
        uniform = torch.rand(probability.shape, generator=self.generator, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
        noise = torch.logit(uniform).to(probability.device)
        return torch.sigmoid((torch.logit(probability.clamp(1e-6, 1 - 1e-6)) + noise) / self.temperature)


@dataclass(frozen=True)
class Soft(StraightThrough):
    """p block(x) + (1 - p) skip(x): every gradient is exact, of a function that inference does not compute.

    Which keys are seen is decided as in inference.
    """

    def blend(self, rows: Tensor, base: Tensor, keep: Tensor, gate: Tensor | None) -> Tensor:
        if gate is None:
            return torch.where(keep[..., None], rows, base)
        return base + (gate[..., None] * (rows - base)).to(base.dtype)
