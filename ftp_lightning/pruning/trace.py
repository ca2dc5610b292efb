"""What a forward decided."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Trace:
    """Decisions of the last forward.

    Attributes:
        keep: one bool tensor (B, T) per block, True = the token was computed; padding is False everywhere.
        real: (B, T) bool, False for padding.
        prompt: the trace of the last routed prompt, also while `generate` goes on past it; None before the first.
    """

    keep: list[Tensor] = field(default_factory=list)
    real: Tensor | None = None
    prompt: Trace | None = None

    @property
    def sparsity(self) -> list[float]:
        """Realised token sparsity of each block: the share of real tokens that skipped it.

        After a training forward it is that of the whole text, its dense rest included.
        """
        if not self.keep:
            return []
        total = self.real.sum()
        return (1.0 - torch.stack([k.sum() for k in self.keep]) / total.clamp(min=1)).tolist()

    @property
    def row_sparsity(self) -> Tensor:
        """(B,) float: realised token sparsity of each row, averaged over the blocks."""
        computed = torch.stack(self.keep).sum((0, 2)).to(torch.float64)
        return 1.0 - computed / (self.real.sum(1).clamp(min=1) * len(self.keep))
