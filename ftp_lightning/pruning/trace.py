"""What a forward decided."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ftp_lightning.pruning.decide import RoutedTokens
    from ftp_lightning.routing.base import RoutingContext


@dataclass
class Trace:
    """Decisions of the last forward.

    Attributes:
        keep: one bool tensor (B, T) per block, True = the token entered the block; padding is False everywhere.
        keep_attention, keep_mlp: the same of the block's two parts. For decisions about whole blocks all three agree;
            otherwise `keep` is where at least one part was computed.
        real: (B, T) bool, False for padding; None before the first forward.
        last_only: of the last block's tokens only those ran whose output is read.
        too_short: the prompt has fewer tokens than the pruner's `least_tokens`: nothing was skipped.
        prompt: the trace of the last routed prompt, also while `generate` goes on past it; None before the first.
    """

    keep: list[Tensor] = field(default_factory=list)
    keep_attention: list[Tensor] = field(default_factory=list)
    keep_mlp: list[Tensor] = field(default_factory=list)
    real: Any = None
    prompt: Trace | None = None
    last_only: bool = False
    too_short: bool = False

    @property
    def routed(self) -> Trace:
        """`prompt`, where one is known to have been routed."""
        assert self.prompt is not None
        return self.prompt

    @property
    def sparsity(self) -> list[float]:
        """Realised token sparsity of each block: the share of real tokens that skipped it; a part counts half.

        After a training forward it is that of the whole text, its dense rest included.
        """
        if not self.keep:
            return []
        computed = self._computed().sum(1) / 2
        return (1.0 - computed / self.real.sum().clamp(min=1)).tolist()

    @property
    def row_sparsity(self) -> Tensor:
        """(B,) float: realised token sparsity of each row, averaged over the blocks."""
        computed = self._computed().sum(0).to(torch.float64) / 2
        return 1.0 - computed / (self.real.sum(1).clamp(min=1) * len(self.keep))

    def _computed(self) -> Tensor:
        """(N, B): tokens computed, attention and MLP added up."""
        parts = zip(self.keep_attention or self.keep, self.keep_mlp or self.keep)
        return torch.stack([attention.sum(1) + mlp.sum(1) for attention, mlp in parts])


@dataclass
class Routing:
    """What the router said in one block of a training forward: for the losses.

    Attributes:
        probability: (B, P) float32 with gradient.
        keep: (B, P) bool.
        routed: the tokens that were ranked.
        context: what the router saw.
    """

    probability: Tensor
    keep: Tensor
    routed: RoutedTokens
    context: RoutingContext
