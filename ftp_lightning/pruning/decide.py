"""Which of the new tokens enter a block: the router is asked, and the best K are chosen.

Nobody else counts and chooses tokens. Shapes: B rows, T tokens, padding included, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.pruning.kept import Kept
from ftp_lightning.routing.base import RoutingContext
from ftp_lightning.routing.fixed import FixedRouter

if TYPE_CHECKING:
    from ftp_lightning.pruning.block_run import BlockRun

# ---------------------------------------------------------------- from scores to `keep`


def kept_tokens(length: int, sparsity: float, reserved: int) -> int:
    """Tokens of a row that enter a block: max(min(reserved, T), T - round_half_even(s * T)), in float64.

    The one rounding rule [ours, method.md section 2]; everybody who counts tokens calls it. `length` T is the row's
    real length (padding not counted), `reserved` the number of tokens that are always kept. s = 0 gives T, s = 1 the
    reserved.
    """
    return max(min(reserved, length), length - round(float(sparsity) * length))  # round() rounds half to even


def reserved_tokens(length: int, starts: bool = True) -> int:
    """How many tokens of a row are always kept: the first, where the text starts here, and the last [ours]."""
    return min(length, 2 if starts else 1)


@dataclass(frozen=True)
class RoutedTokens:
    """The tokens that are routed together: one prompt, or one chunk of it.

    Attributes:
        real: (B, T) bool, False for padding.
        position: (B, T) int64, index among the row's real tokens.
        lengths: real tokens of each row, on the host: counts are known without asking the device.
        reserved: (B, T) bool, always kept: the row's first token (attention sink) and its last (its logits are wanted).
        reserved_counts: how many of those each row has.
        settled: (B, T) bool, where no score is asked. rank: (B, T), what stands for it there: the reserved come first,
            padding last.
    """

    real: Tensor
    position: Tensor
    lengths: tuple[int, ...]
    reserved: Tensor
    reserved_counts: tuple[int, ...]
    settled: Tensor
    rank: Tensor

    @staticmethod
    def of(real: Tensor, padded: bool, first_chunk: bool | Sequence[bool] = True) -> RoutedTokens:
        """`padded=False` promises that `real` is all True and spares the one look at the device.

        first_chunk: whether the text starts here, of all rows or of each; only then its first token is reserved.
        """
        batch, tokens = real.shape
        if padded:
            position = real.to(torch.int64).cumsum(1) - 1
            lengths = tuple(real.sum(1).tolist())
            last = real & (position == position[:, -1:])
        else:
            position = torch.arange(tokens, device=real.device).expand(batch, tokens)
            lengths = (tokens,) * batch
            last = position == tokens - 1
        starts = (first_chunk,) * batch if isinstance(first_chunk, bool) else tuple(first_chunk)
        first = real & (position == 0)
        if not all(starts):
            first = first & torch.tensor(starts, device=real.device)[:, None]
        reserved, counts = last | first, tuple(map(reserved_tokens, lengths, starts))
        settled, rank = reserved | ~real, torch.where(reserved, torch.inf, -torch.inf)
        return RoutedTokens(real, position, lengths, reserved, counts, settled, rank)

    def counts(self, sparsity: float) -> tuple[int, ...]:
        """How many tokens of each row enter a block of this sparsity."""
        return tuple(map(kept_tokens, self.lengths, repeat(sparsity), self.reserved_counts))


def choose_topk(
    score: Tensor, routed: RoutedTokens, counts: tuple[int, ...], on_device: Tensor | None = None
) -> Tensor:
    """Exactly `counts[b]` tokens with the highest score in row b, the reserved ones first [ours].

    Ties go to the earlier token.

    Args:
        score: (B, T).
        counts: kept tokens of each row.
        on_device: (B, 1), `counts` where the score is, if it is there already.

    Returns:
        keep (B, T) bool. Invariant: keep.sum(1) == counts, keep <= real.
    """
    order = torch.where(routed.settled, routed.rank, score).sort(dim=1, descending=True, stable=True).indices
    if len(set(counts)) == 1:
        return torch.zeros_like(routed.real).scatter(1, order[:, : counts[0]], True)
    rank = torch.arange(score.shape[1], device=score.device).expand_as(order)
    wanted = torch.tensor(counts, device=score.device)[:, None] if on_device is None else on_device
    return torch.zeros_like(routed.real).scatter(1, order, rank < wanted)


def choose_threshold(probability: Tensor, routed: RoutedTokens, threshold: float) -> Tensor:
    """Compute where p_compute > threshold (paper), and the reserved tokens: the realised sparsity floats. (B, T)
    bool."""
    return ((probability > threshold) & routed.real) | routed.reserved


# ---------------------------------------------------------------- asking the router


@dataclass
class Decision:
    """What one block does with the new tokens: those that enter its attention and those that enter its MLP.

    For decisions about whole blocks both are one object; a part that is None computes all tokens. `gates`: what the
    router's p_compute of the two is in training, None where it was not asked.
    """

    attention: Kept | None
    mlp: Kept | None
    gates: tuple[Tensor | None, Tensor | None] = (None, None)


def decide(run: BlockRun) -> Decision | None:
    """What this block does with the new tokens; None where it computes all of them."""
    if run.plan.removed:
        return _without(run, run.plan.removed)
    ask = run.forward.ask
    if ask is None or not run.plan.routed:
        return None
    if "block" in run.plan.parts:
        kept, gate = ask(run, "block")
        return None if kept.whole and run.forward.training is None else Decision(kept, kept, (gate, gate))
    decided = {part: ask(run, part) for part in run.plan.parts}
    decided = {part: found for part, found in decided.items() if run.forward.training or not found[0].whole}
    (attention, first), (mlp, second) = (decided.get(part, (None, None)) for part in ("attention", "mlp"))
    return Decision(attention, mlp, (first, second)) if decided else None


def route(run: BlockRun, part: str, score: Tensor | None = None) -> tuple[Kept, Tensor | None]:
    """The tokens of a prompt that enter a part of a block. score (B, P): what they are chosen by; None: the router is
    asked."""
    forward, pruner, routed = run.forward, run.attached.pruner, run.forward.routed
    place = forward.real.device
    assert routed is not None
    if isinstance(pruner.router, FixedRouter):
        keep, counts = replayed(run, part, longer=pruner.decode != "dense")
        return Kept(keep.to(place), counts), None
    context, by_rank = prompt_context(run, part), pruner.choice == "topk"
    with torch.no_grad():
        if score is None:
            score = pruner.router.score(context) if by_rank else pruner.router.probability(context)
        if by_rank:
            counts = forward.counts[run.plan.index]
            last = forward.chosen if part == "block" and score is forward.ranked_by else None
            if last is not None and (counts, place) == (last.counts, last.keep.device):
                return last, None  # the router ranks once for all blocks, and this one keeps as many as the last
            keep = choose_topk(score, routed, counts, context.kept)
        else:
            keep = choose_threshold(score, routed, pruner.threshold)
            counts = tuple(keep.sum(1).tolist())
    forward.entered, forward.ranked_by, forward.chosen = keep, score, Kept(keep.to(place), counts)
    return forward.chosen, None


def prompt_context(run: BlockRun, part: str) -> RoutingContext:
    """What a router may look at in this block of a prompt."""
    forward, plan, routed, table = run.forward, run.plan, run.forward.routed, run.forward.table
    assert routed is not None
    hidden = run.call.hidden[:, : routed.real.shape[1]]
    return RoutingContext(
        plan.index, plan.sparsity, routed.real, routed.position, forward.lengths, forward.kept[plan.index][:, None],
        attention=None if table is None else table.own.to(forward.home),
        hidden=hidden.to(forward.home) if run.attached.plan.needs.hidden else hidden,
        schedule=run.attached.plan.sparsity, part=part, padded=forward.padded, memo=forward.memo,
        entered=forward.entered, scouted=forward.scouted,
    )  # fmt: skip


def replayed(run: BlockRun, part: str, longer: bool) -> tuple[Tensor, tuple[int, ...]]:
    """What a FixedRouter says; read on the host where there is no padding, so that no device is asked."""
    router, forward, block = run.attached.pruner.router, run.forward, run.plan.index
    assert isinstance(router, FixedRouter)
    real = forward.real if forward.routed is None else forward.routed.real
    keep = router.decision(block, real, part, past=forward.past, longer=longer)
    if forward.padded:
        return keep, tuple(keep.sum(1).tolist())
    past, tokens = (forward.past, real.shape[1]) if longer else (0, None)
    return keep, router.host_counts(block, len(real), part, past=past, tokens=tokens)


def _without(run: BlockRun, gone: frozenset[str]) -> Decision:
    """A block of which something is removed: nothing enters that, prompt or continuation; the rest is decided as
    ever, a decision about whole blocks being one about what is left of this one."""
    forward, apart = run.forward, "block" not in run.plan.parts
    nothing = Kept(torch.zeros_like(forward.real), (0,) * len(forward.real))
    if len(gone) == 2:  # decided apart, each part gets what `skip` says of it
        return Decision(nothing, Kept(nothing.keep.clone(), nothing.counts) if apart else nothing)
    left = "mlp" if "attention" in gone else "attention"
    kept: Kept | None = None
    gate: Tensor | None = None
    part = left if apart else "block"
    if forward.ask is not None and run.plan.routed and part in run.plan.parts:
        kept, gate = forward.ask(run, part)
        kept = None if kept.whole and forward.training is None else kept
    if left == "mlp":
        return Decision(nothing, kept, (None, gate))
    return Decision(kept, nothing, (gate, None))
