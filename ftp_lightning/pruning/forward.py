"""One forward of the model: which phase it is, which of its tokens are real, and how many each block may keep.

Shapes: B rows, T new tokens of this forward (padding included), P routed ones, N blocks.
A *slot* is a token's place among all tokens seen, padding included; `past` slots were seen before this forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.ambient import Training
from ftp_lightning.pruning.cache import RoutedLayer
from ftp_lightning.pruning.continuation_scores import ContinuationTable
from ftp_lightning.pruning.decide import RoutedTokens, route
from ftp_lightning.pruning.family import CACHE
from ftp_lightning.pruning.generation import Generation
from ftp_lightning.pruning.kept import Kept, Tokens
from ftp_lightning.pruning.policies import follow
from ftp_lightning.pruning.refusals import check_checkpointing, check_router_logits
from ftp_lightning.pruning.scores import PromptTable
from ftp_lightning.pruning.trace import Routing, Trace
from ftp_lightning.pruning.training_run import decided_with_gate
from ftp_lightning.routing.base import Scout
from ftp_lightning.routing.fixed import FixedRouter

if TYPE_CHECKING:
    from ftp_lightning.pruning.attached import Attached
    from ftp_lightning.pruning.block_run import BlockRun

Ask = Callable[["BlockRun", str], tuple[Kept, Tensor | None]]


@dataclass
class Forward:
    """One forward of the model.

    Routers decide at `home`, the device where the forward came in: `routed`, `kept`, `lengths`, `memo`, `entered` and
    `scouted` stay there. Of a dispatched model the rest goes with the tokens from device to device (`go_to`).

    Attributes:
        real: (B, T) bool, False for padding. past_real: (B, past), None without padding.
        past: slots seen before. span: slots seen when this forward is done.
        new: the tokens of this forward.
        padded: whether there is padding.
        is_prompt: its tokens are a prompt or a chunk of one, not a continuation.
        routed: those that are ranked together; None for a continuation, and where nothing is changed.
        active: some block does something else than the stock model; else the wrappers of blocks do not see it.
        training: the differentiable forward, with these settings.
        ask: what finds the tokens that enter a part of a block; None: all do (a continuation under `decode="dense"`).
        plain_step: one continuation token a row, none of them padded or free to skip a block.
        table: the attention scores that the router reads. scored: the blocks that write into it.
        counts: of each block the kept tokens of each row under the schedule, on the host.
        kept: (N, B) int64, `counts` where routers decide. lengths: (B, 1) int64, real tokens of each row of the routed
            ones.
        memo: what routers carry from block to block.
        entered: (B, P), the tokens that entered the last routed block. chosen: the same, gathered. ranked_by: (B, P),
            the scores they were chosen by.
        look: this forward is the `Scout` of another. scouted: (B, P), what that one said.
        last_tokens: how many last positions of the model's output are read; None: perhaps all.
        run: the block that is running.
    """

    real: Tensor
    past: int
    span: int
    new: Tokens
    home: torch.device
    trace: Trace
    past_real: Tensor | None = None
    padded: bool = False
    is_prompt: bool = False
    routed: RoutedTokens | None = None
    active: bool = True
    training: Training | None = None
    ask: Ask | None = None
    plain_step: bool = False
    table: PromptTable | ContinuationTable | None = None
    scored: frozenset[int] = frozenset()
    counts: list[tuple[int, ...]] = field(default_factory=list)
    routings: list[Routing] = field(default_factory=list)
    kept: Tensor = field(init=False)
    lengths: Tensor = field(init=False)
    memo: dict = field(default_factory=dict)
    entered: Tensor | None = None
    chosen: Kept | None = None
    ranked_by: Tensor | None = None
    look: Scout | None = None
    scouted: Tensor | None = None
    last_tokens: int | None = None
    run: BlockRun | None = None

    @staticmethod
    def of(shape: torch.Size, past: int, mask: Tensor | None, home: torch.device) -> Forward:
        """shape: (B, T). mask (B, past + T), 1 = real; None: no padding."""
        batch, tokens = shape
        past_real, padded = None, False
        if mask is None:
            real = torch.ones(batch, tokens, dtype=torch.bool, device=home)
        else:
            mask = mask.to(home)[:, -(past + tokens) :].to(torch.bool)
            padded = not bool(mask.all())
            real, past_real = mask[:, -tokens:], mask[:, :-tokens] if padded else None
        slots = torch.arange(past, past + tokens, device=home).expand(batch, tokens)
        new = Tokens(slots, real, not padded)
        return Forward(real, past, past + tokens, new, home, Trace(real=real), past_real, padded)

    def note(self, attention: Tensor, mlp: Tensor) -> None:
        """The next block's decision, (B, T) bool for each part, goes into the trace, where `real` is."""
        trace, whole = self.trace, attention is mlp
        if attention.device != self.home:
            attention = attention.to(self.home)
            mlp = attention if whole else mlp.to(self.home)
        trace.keep.append(attention if whole else attention | mlp)
        trace.keep_attention.append(attention)
        trace.keep_mlp.append(mlp)

    def note_dense(self, blocks: int) -> None:
        """So many blocks ran as they are, on all tokens."""
        trace = self.trace
        trace.keep, trace.keep_attention, trace.keep_mlp = ([self.real] * blocks for _ in range(3))

    def go_to(self, place: torch.device) -> None:
        """Take along to this device what blocks look at."""
        if self.real.device == place:
            return
        self.real = self.real.to(place)
        self.new = Tokens(self.new.slots.to(place), self.real, self.new.all_valid)
        self.past_real = None if self.past_real is None else self.past_real.to(place)
        if self.table is not None:
            self.table.go_to(place)
        for derived in ("seen", "position"):
            self.__dict__.pop(derived, None)

    @cached_property
    def seen(self) -> Tokens:
        """All tokens, those of earlier forwards first, where there were any."""
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

    @property
    def host_lengths(self) -> list[list[int]]:
        """For every new token the number of its row's real tokens up to itself."""
        if not self.padded:
            return [list(range(self.past + 1, self.span + 1))] * len(self.real)
        return (self.position + 1).tolist()


def open_forward(attached: Attached, arguments: dict, past: int, generation: Generation | None) -> Forward:
    """The forward that a call of the decoder is.

    generation: the call of `generate` whose text it is about. UserError for what cannot be pruned right.
    """
    ambient, mask, tokens = attached.ambient, arguments.get("attention_mask"), arguments.get("input_ids")
    check_call(attached, arguments, past)
    if generation is not None and past >= generation.prompt_end and generation.whole:
        mask = None  # it is known to be all 1
    tokens = arguments["inputs_embeds"] if tokens is None else tokens
    forward = Forward.of(tokens.shape[:2], past, mask, attached.home or tokens.device)
    if generation is not None and past < generation.prompt_end:
        generation.whole = not forward.padded
    routes_chunks = ambient.generation is None and ambient.routes_chunks
    if past == 0 or (routes_chunks if generation is None else generation.is_prompt(past)):
        _open_prompt(attached, forward)
    else:
        _open_continuation(attached, forward, arguments[CACHE])
    if attached.gives_router_logits:
        check_router_logits(attached, arguments, forward)
    return forward


def check_call(attached: Attached, arguments: dict, past: int) -> None:
    """UserError for padding that is not understood, packed texts, and a model that was changed since `attach`."""
    mask, positions, decoder = arguments.get("attention_mask"), arguments.get("position_ids"), attached.decoder
    training = attached.ambient.training
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise UserError(
            "a TokenPruner reads padding from a (batch, tokens) attention_mask; other masks are not supported."
        )
    if positions is not None and mask is None:
        wanted = arguments.get("use_cache")
        caches = decoder.config.use_cache if wanted is None else wanted
        caches = training is None and (caches or arguments.get(CACHE) is not None)
        if not caches and bool((positions.diff(dim=-1) != 1).any()):  # then transformers looks for packed texts
            raise UserError(
                "position_ids with gaps, without a cache and a mask, mean packed texts, which cannot be pruned.\n"
                "Give one text a row, with an attention_mask."
            )
    if training is not None and past:
        raise UserError("the training forward takes the whole text in one pass, without a filled cache.")
    if decoder.config._attn_implementation != attached.plan.blocks[0].site.backend.name:
        raise UserError("the attention implementation was changed while a pruner is attached.\nDetach it first.")
    if torch.is_grad_enabled():
        check_checkpointing(attached)


def _open_prompt(attached: Attached, forward: Forward) -> None:
    """The new tokens are ranked together: a prompt, or a chunk of one; in training the first ones alone."""
    plan, training = attached.plan, attached.ambient.training
    forward.is_prompt, forward.training, forward.active = True, training, plan.changes
    forward.ask = route if training is None else decided_with_gate
    if plan.changes and not forward.past and training is None:  # what follows a routed prompt is routed
        longest = int(forward.real.sum(1).max()) if forward.padded else forward.real.shape[1]
        forward.trace.too_short = longest < plan.least_tokens  # skipping would cost it more than it saves
        forward.active = not forward.trace.too_short
    if not forward.active:
        return
    forward.last_tokens = attached.ambient.last_tokens
    starts: bool | list[bool] = forward.past == 0
    if forward.past and forward.past_real is not None:  # a row whose padding filled the chunks before starts here
        starts = (~forward.past_real.any(1)).tolist()
    real = forward.real if training is None else forward.real[:, : training.prompt_tokens]
    forward.routed = routed = RoutedTokens.of(real, forward.padded, starts)
    if isinstance(attached.pruner.router, FixedRouter):
        return
    forward.counts = list(map(routed.counts, plan.sparsity))
    forward.kept = torch.tensor(forward.counts, device=forward.home)
    if forward.padded:
        forward.lengths = torch.tensor(routed.lengths, device=forward.home)[:, None]
    else:
        forward.lengths = torch.full((len(real), 1), routed.lengths[0], device=forward.home)
    if plan.needs.attention:
        forward.table, forward.scored = prompt_table(attached, forward, plan.needs.adds_up), plan.scored


def prompt_table(attached: Attached, forward: Forward, adds_up: bool = False) -> PromptTable:
    """An empty table of scores that knows whose queries count. UserError where a question's span is wanted and not
    given, or ends behind its prompt."""
    score, ambient, routed = attached.pruner.attention_score, attached.ambient, forward.routed
    assert routed is not None  # a continuation has another table
    tokens = routed.real.shape[1]
    own = torch.full(routed.real.shape, 0.0 if adds_up else 1.0, dtype=torch.float32, device=forward.real.device)
    known = torch.zeros_like(own, dtype=torch.bool) if attached.plan.greatest else None
    table = PromptTable(own, adds_up, known)
    if isinstance(score.window, int) and not score.window_end:
        table.last = score.window
    elif score.window != "question" or (attached.plan.needs.reads is None and forward.active):
        whole = not forward.past and (ambient.generation is None or ambient.generation.prompt_end == tokens)
        lengths = routed.lengths if whole else ()
        table.ask(score, routed.real, forward.position[:, :tokens], ambient.spans, lengths)
    return table


def _open_continuation(attached: Attached, forward: Forward, cache) -> None:
    plan, pruner = attached.plan, attached.pruner
    forward.ask = follow if pruner.decode != "dense" and plan.routes else None
    has_routed = any(isinstance(layer, RoutedLayer) for layer in cache.layers)
    forward.active = forward.ask is not None or has_routed or bool(pruner.removed)
    forward.plain_step = forward.ask is None and not forward.padded and forward.real.shape[1] == 1
    if forward.ask is not None and plan.needs.attention:
        forward.table = ContinuationTable(forward.real, forward.past_real, forward.past, plan.greatest)
        forward.scored = plan.scored
