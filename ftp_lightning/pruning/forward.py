"""One forward of the model: which phase it is, which of its tokens are real, and how many each block may keep.

Shapes: B rows, T new tokens of this forward (padding included), P routed ones, N blocks.
A *slot* is a token's place among all tokens seen, padding included; `past` slots were seen before this forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.pruning.ambient import Training
from ftp_lightning.pruning.attention import Sight
from ftp_lightning.pruning.kept import Tokens
from ftp_lightning.pruning.table import ContinuationTable, PromptTable
from ftp_lightning.pruning.trace import Trace
from ftp_lightning.routing.base import RoutingContext, Scout
from ftp_lightning.routing.choice import RoutedTokens

if TYPE_CHECKING:
    from ftp_lightning.pruning.block_run import BlockRun


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


@dataclass
class Forward:
    """One forward of the model.

    Routers decide at `home`, the device where the forward came in: `routed`, `kept`, `lengths`, `memo`, `entered` and
    `scouted` stay there. Of a dispatched model the rest goes with the tokens from device to device (`go_to`).

    Attributes:
        real: (B, T) bool, False for padding. past_real: (B, past), None without padding.
        past: slots seen before.
        padded: whether there is padding.
        routed: the tokens that are ranked together; None for a continuation.
        active: some block does something else than the stock model.
        training: the differentiable forward, with these settings.
        follows: this continuation obeys a decode policy.
        table: the attention scores that the router reads.
        counts: of each block the kept tokens of each row under the schedule, on the host.
        memo: what routers carry from block to block.
        entered: (B, P), the tokens that entered the last routed block.
        look: this forward is the `Scout` of another. scouted: (B, P), what that one said.
        last_tokens: how many last positions of the model's output are read; None: perhaps all.
        run: the block that is running.
    """

    real: Tensor
    past: int
    past_real: Tensor | None = None
    padded: bool = False
    routed: RoutedTokens | None = None
    active: bool = True
    training: Training | None = None
    follows: bool = False
    table: PromptTable | ContinuationTable | None = None
    counts: list[tuple[int, ...]] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)
    routings: list[Routing] = field(default_factory=list)
    memo: dict = field(default_factory=dict)
    entered: Tensor | None = None
    look: Scout | None = None
    scouted: Tensor | None = None
    last_tokens: int | None = None
    run: BlockRun | None = None

    def __post_init__(self) -> None:
        self.home = self.real.device

    @staticmethod
    def of(
        tokens: Tensor,
        mask: Tensor | None,
        past: int,
        home: torch.device | None = None,
        whole: bool = False,
        training: Training | None = None,
    ) -> Forward:
        """tokens (B, T) ids or (B, T, D) embeddings; mask (B, past + T), 1 = real; `whole`: it is known to be all 1."""
        (batch, new), device = tokens.shape[:2], home or tokens.device
        real, past_real, padded = torch.ones(batch, new, dtype=torch.bool, device=device), None, False
        if mask is not None and not whole:
            mask = mask.to(device)[:, -(past + new) :].to(torch.bool)
            padded = not bool(mask.all())
            real, past_real = mask[:, -new:], mask[:, :-new] if padded else None
        return Forward(real, past, past_real, padded, training=training, trace=Trace(real=real))

    def route(self, width: int, sparsities: tuple[float, ...] | None) -> None:
        """The first `width` new tokens are ranked together: a prompt, or a chunk of one."""
        starts: bool | list[bool] = self.past == 0
        if self.past and self.past_real is not None:  # a row whose padding filled the chunks before starts here
            starts = (~self.past_real.any(1)).tolist()
        self.routed = routed = RoutedTokens.of(self.real[:, :width], self.padded, starts)
        if self.active and sparsities is not None:
            self.counts = [routed.counts(s) for s in sparsities]

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
        return self.routed is None and not self.follows and not self.padded and self.real.shape[1] == 1

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
        """(N, B) int64: `counts` where routers decide."""
        return torch.tensor(self.counts, device=self.home)

    @cached_property
    def lengths(self) -> Tensor:
        """(B, 1) int64, real tokens of each row of the routed ones."""
        assert self.routed is not None
        if not self.padded:
            return torch.full((len(self.real), 1), self.routed.lengths[0], device=self.home)
        return torch.tensor(self.routed.lengths, device=self.home)[:, None]
