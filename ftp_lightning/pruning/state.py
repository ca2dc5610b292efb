"""What the engine knows: of a block (Site), of the forward that is running (Pass), of a decision that training needs.

Shapes: B rows, T new tokens of this forward (padding included), P routed ones.
A *slot* is a token's place among all tokens seen, padding included; `past` slots were seen before this forward.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.attention import Tokens
from ftp_lightning.pruning.blocks import cache_name, find_attention, sliding_window
from ftp_lightning.pruning.trace import Trace
from ftp_lightning.routing.base import RoutingContext
from ftp_lightning.routing.choice import RoutedPart

IMPLEMENTATIONS = ("sdpa", "eager")


@dataclass(frozen=True)
class Site:
    """A block as the engine sees it."""

    signature: inspect.Signature
    cache_name: str
    attention: nn.Module
    window: int | None
    implementation: str

    @staticmethod
    def of(block: nn.Module) -> Site:
        """UserError where the block's attention implementation wants masks that the engine does not make."""
        attention = find_attention(block)
        implementation = attention.config._attn_implementation
        if implementation not in IMPLEMENTATIONS:
            raise UserError(
                f"attention implementation {implementation!r} cannot be pruned by this version.\n"
                f"Load the model with attn_implementation={' or '.join(map(repr, IMPLEMENTATIONS))}."
            )
        signature = inspect.signature(functools.partial(type(block).forward, block))
        return Site(signature, cache_name(block), attention, sliding_window(attention), implementation)


@dataclass
class Decision:
    """What the masked executor decided in one block: for the losses.

    probability (B, P) float32 with gradient; keep (B, P) bool; part: the routed tokens; context: what the router saw.
    """

    probability: Tensor
    keep: Tensor
    part: RoutedPart
    context: RoutingContext


@dataclass
class Pass:
    """One forward of the model.

    real (B, T) and past_real (B, past; None without padding) mark real tokens; part is None for a continuation; masked
    = the training executor; table (B, P) holds the latest attention scores.
    """

    real: Tensor
    past: int
    past_real: Tensor | None
    padded: bool
    part: RoutedPart | None
    masked: bool = False
    table: Tensor | None = None
    trace: Trace = field(default_factory=Trace)
    decisions: list[Decision] = field(default_factory=list)

    @property
    def span(self) -> int:
        """Slots seen when this forward is done."""
        return self.past + self.real.shape[1]

    @property
    def new(self) -> Tokens:
        """The tokens of this forward."""
        slots = torch.arange(self.past, self.span, device=self.real.device).expand(self.real.shape)
        return Tokens(slots, self.real, not self.padded)

    @property
    def seen(self) -> Tokens:
        """All tokens, those of earlier forwards first."""
        if not self.past:
            return self.new
        slots = torch.arange(self.past, device=self.real.device).expand(self.real.shape[0], self.past)
        valid = torch.ones_like(slots, dtype=torch.bool) if self.past_real is None else self.past_real
        return Tokens(slots, valid, not self.padded).followed_by(self.new)
