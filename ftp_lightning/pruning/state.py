"""What the engine knows: of a block (Site), of the forward that is running (Pass), of a decision that training needs.

Shapes: B rows, T new tokens of this forward (padding included), P routed ones.
A *slot* is a token's place among all tokens seen, padding included; `past` slots were seen before this forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from ftp_lightning.pruning.attention import Backend, Sight
from ftp_lightning.pruning.calls import Signature
from ftp_lightning.pruning.devices import hooked_place
from ftp_lightning.pruning.family import cache_name, find_attention, find_mlp, query_projection, sliding_window
from ftp_lightning.pruning.kept import Rows, Tokens
from ftp_lightning.pruning.table import ContinuationTable, PromptTable
from ftp_lightning.pruning.trace import Trace
from ftp_lightning.routing.base import RoutingContext, Scout
from ftp_lightning.routing.choice import RoutedPart


@dataclass(frozen=True)
class Site:
    """A block as the engine sees it. `mlp`: where tokens enter and leave its feed-forward part; `place`: the device
    that the hooks of a dispatched model bring its arguments to, None where there are none."""

    block: Signature
    attention: nn.Module
    part: Signature
    mlp: tuple[nn.Module, nn.Module] | None
    query: nn.Module | None
    window: int | None
    backend: Backend
    place: torch.device | None = None

    @staticmethod
    def of(block: nn.Module) -> Site:
        """UserError where the block's attention implementation wants masks that the engine does not make."""
        attention = find_attention(block)
        return Site(
            Signature(block, cache_name(block)),
            attention,
            Signature(attention, cache_name(attention)),
            find_mlp(block),
            query_projection(attention),
            sliding_window(attention),
            Backend.of(attention),
            hooked_place(block),
        )


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
class Chosen:
    """What one block does with the new tokens: the rows that enter its attention and those that enter its MLP.

    For decisions about whole blocks both are one object; a part that is None computes all tokens. `gates` are the
    router's p_compute of the two (training).
    """

    attention: Rows | None
    mlp: Rows | None
    gates: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def by_block(self) -> bool:
        return self.attention is self.mlp


@dataclass
class Pass:
    """One forward of the model.

    real (B, T) and past_real (B, past; None without padding) mark real tokens; part is None for a continuation.
    `active`: some block does something else than the stock model. masked = the training executor. `follows`: this
    continuation obeys a decode policy. counts[l]: kept tokens of each row in block l under the schedule, on the host;
    kept (N, B) the same on the device. memo: what routers carry from block to block. entered (B, P): the tokens that
    entered the last routed block. look: this forward is the `Scout` of another; scouted (B, P): what that one said.

    Routers decide at `home`, the device where the forward came in: `part`, `kept`, `lengths`, `memo`, `entered` and
    `scouted` stay there. Of a dispatched model the rest goes with the tokens from device to device (`go_to`).
    """

    real: Tensor
    past: int
    past_real: Tensor | None
    padded: bool
    part: RoutedPart | None
    active: bool = True
    masked: bool = False
    follows: bool = False
    table: PromptTable | ContinuationTable | None = None
    counts: list[tuple[int, ...]] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)
    decisions: list[Decision] = field(default_factory=list)
    memo: dict = field(default_factory=dict)
    entered: Tensor | None = None
    look: Scout | None = None
    scouted: Tensor | None = None

    def __post_init__(self) -> None:
        self.home = self.real.device

    def go_to(self, place: torch.device) -> None:
        """Take along to this device what blocks look at."""
        if self.real.device == place:
            return
        self.real = self.real.to(place)
        self.past_real = None if self.past_real is None else self.past_real.to(place)
        if self.table is not None:
            self.table.go_to(place)
        for derived in ("new", "seen", "everything", "position"):
            self.__dict__.pop(derived, None)

    @property
    def span(self) -> int:
        """Slots seen when this forward is done."""
        return self.past + self.real.shape[1]

    @cached_property
    def plain_step(self) -> bool:
        """One continuation token a row, none of them padded or free to skip a block."""
        return self.part is None and not self.follows and not self.padded and self.real.shape[1] == 1

    @cached_property
    def everything(self) -> Sight:
        """What the one token of a plain step sees: all that is stored."""
        return Sight(self.new, self.new, everything=True)

    @cached_property
    def new(self) -> Tokens:
        """The tokens of this forward."""
        slots = torch.arange(self.past, self.span, device=self.real.device).expand(self.real.shape)
        return Tokens(slots, self.real, not self.padded)

    @cached_property
    def seen(self) -> Tokens:
        """All tokens, those of earlier forwards first."""
        if not self.past:
            return self.new
        slots = torch.arange(self.past, device=self.real.device).expand(self.real.shape[0], self.past)
        valid = torch.ones_like(slots, dtype=torch.bool) if self.past_real is None else self.past_real
        return Tokens(slots, valid, not self.padded).followed_by(self.new)

    @cached_property
    def position(self) -> Tensor:
        """(B, T) int64, index of each new token among its row's real tokens."""
        if not self.padded:
            return self.new.slots
        before = 0 if self.past_real is None else self.past_real.sum(1, keepdim=True)
        return (before + self.real.to(torch.int64).cumsum(1) - 1).clamp(min=0)

    @cached_property
    def host_lengths(self) -> list[list[int]]:
        """For every new token the number of its row's real tokens up to itself."""
        if not self.padded:
            return [list(range(self.past + 1, self.span + 1))] * len(self.real)
        return (self.position + 1).tolist()

    @cached_property
    def kept(self) -> Tensor:
        """(N, B) int64."""
        return torch.tensor(self.counts, device=self.home)

    @cached_property
    def lengths(self) -> Tensor:
        """(B, 1) int64, real tokens of each row of the routed part."""
        assert self.part is not None
        return torch.tensor(self.part.lengths, device=self.home)[:, None]
