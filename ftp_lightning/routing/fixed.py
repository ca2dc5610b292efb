"""Replays decisions: to reproduce a trace, to test, to measure one decision against another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ftp_lightning.routing.base import Router


class FixedRouter(Router):
    """Obeys its list alone: no schedule, no reservation, no choice.

    Args:
        keep: one bool tensor (B, T) per block; True = the token enters the block. False on padding.

    Raises:
        ValueError: entries of different shapes, or not two-dimensional. A prompt of another shape is refused when it
        comes.
    """

    def __init__(self, keep: Sequence[Tensor]):
        super().__init__()
        self.keep = [torch.as_tensor(k).to(torch.bool) for k in keep]
        shapes = {tuple(k.shape) for k in self.keep}
        if not self.keep or len(shapes) != 1 or self.keep[0].dim() != 2:
            raise ValueError(
                f"FixedRouter wants one (batch, tokens) mask per block, all alike; got shapes {sorted(shapes)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.keep[0].shape)

    def decision(self, block: int, real: Tensor) -> Tensor:
        """(B, T) bool for this block; ValueError where the prompt has another shape than the list."""
        if tuple(real.shape) != self.shape:
            raise ValueError(f"FixedRouter holds decisions of shape {self.shape}, the prompt is {tuple(real.shape)}")
        return self.keep[block].to(real.device) & real
