"""Asking the router: which of the new tokens enter a block.

Shapes: B rows, T new tokens, P routed ones, N blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.pruning import policies
from ftp_lightning.pruning.forward import Routing
from ftp_lightning.pruning.kept import Kept
from ftp_lightning.pruning.table import ContinuationTable
from ftp_lightning.routing.base import ADDRESSED, RoutingContext
from ftp_lightning.routing.choice import choose_threshold, choose_topk
from ftp_lightning.routing.fixed import FixedRouter
from ftp_lightning.schedule import kept_tokens, reserved_tokens

if TYPE_CHECKING:
    from ftp_lightning.pruning.block_run import BlockRun


@dataclass
class Decision:
    """What one block does with the new tokens: those that enter its attention and those that enter its MLP.

    For decisions about whole blocks both are one object; a part that is None computes all tokens. `gates`: what the
    router's p_compute of the two is in training, None where it was not asked.
    """

    attention: Kept | None
    mlp: Kept | None
    gates: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def by_block(self) -> bool:
        return self.attention is self.mlp


@torch.compiler.disable  # bookkeeping: little to compute, and the counts are the host's
def decide(run: BlockRun) -> Decision | None:
    """What this block does with the new tokens; None where it computes all of them."""
    attached, forward = run.attached, run.forward
    if gone := attached.pruner.removed_parts(run.index):
        return _without(run, gone)
    if not _asked(run):
        return None
    if not attached.decides_parts[run.index]:
        kept, gate = _ask(run, "block")
        return None if kept.whole and forward.training is None else Decision(kept, kept, (gate, gate))
    decided = {part: _ask(run, part) for part in _parts(run)}
    decided = {part: found for part, found in decided.items() if forward.training or not found[0].whole}
    (attention, first), (mlp, second) = (decided.get(part, (None, None)) for part in ("attention", "mlp"))
    return Decision(attention, mlp, (first, second)) if decided else None


def _asked(run: BlockRun) -> bool:
    return run.attached.routed[run.index] and (run.forward.routed is not None or run.forward.follows)


def _ask(run: BlockRun, part: str) -> tuple[Kept, Tensor | None]:
    return _follow(run, part) if run.forward.routed is None else _route(run, part)


def _without(run: BlockRun, gone: frozenset[str]) -> Decision:
    """A block of which something is removed: nothing enters that, prompt or continuation; the rest is decided as
    ever, a decision about whole blocks being one about what is left of this one."""
    attached, forward = run.attached, run.forward
    nothing = Kept(torch.zeros_like(forward.real), (0,) * len(forward.real))
    if len(gone) == 2:
        apart = attached.decides_parts[run.index]  # then each part gets what `skip` says of it
        return Decision(nothing, Kept(nothing.keep.clone(), nothing.counts) if apart else nothing)
    left = "mlp" if "attention" in gone else "attention"
    kept: Kept | None = None
    gate: Tensor | None = None
    part = left if attached.decides_parts[run.index] else "block"
    if _asked(run) and (part == "block" or part in _parts(run)):
        kept, gate = _ask(run, part)
        kept = None if kept.whole and forward.training is None else kept
    if left == "mlp":
        return Decision(nothing, kept, (None, gate))
    return Decision(kept, nothing, (gate, None))


def _parts(run: BlockRun) -> tuple[str, ...]:
    pruner = run.attached.pruner
    return ADDRESSED["attention+mlp" if isinstance(pruner.router, FixedRouter) else pruner.parts_by_block[run.index]]


def _route(run: BlockRun, part: str) -> tuple[Kept, Tensor | None]:
    """The decision about routed tokens; in training also that the rest is computed, and p_compute."""
    pruner, forward, routed = run.attached.pruner, run.forward, run.routed
    training, gate = forward.training, None
    if isinstance(pruner.router, FixedRouter):
        keep, counts = _replay(run, routed.real, part, longer=pruner.decode != "dense")
    else:
        context, by_rank = _prompt_context(run, part), pruner.choice == "topk"
        probability = pruner.router.probability(context) if training or not by_rank else None
        gate = training.gates.relax(probability) if training and probability is not None else None
        if by_rank:
            counts = forward.counts[run.index]
            with torch.no_grad():
                score = pruner.router.score(context) if gate is None or gate is probability else gate
                keep = choose_topk(score, routed, counts, context.kept)
        else:
            chance = probability if gate is None else gate
            assert chance is not None  # a threshold asks for it
            keep = choose_threshold(chance.detach(), routed, pruner.threshold)
            counts = tuple(keep.sum(1).tolist())
        forward.entered = keep
        if gate is not None and probability is not None:
            forward.routings.append(Routing(probability, keep, routed, context))
            gate = torch.where(routed.reserved, 1.0, gate)  # always computed: nothing to learn from
    keep, gate = keep.to(forward.real.device), None if gate is None else gate.to(forward.real.device)
    if training:
        keep, counts, gate = _with_the_rest(run, keep, counts, gate)
    return Kept(keep, counts), gate


def _with_the_rest(
    run: BlockRun, keep: Tensor, counts: tuple[int, ...], gate: Tensor | None
) -> tuple[Tensor, tuple[int, ...], Tensor | None]:
    """The same for all new tokens: those after the routed ones are computed."""
    forward = run.forward
    rest = forward.real[:, keep.shape[1] :]
    more = rest.sum(1).tolist() if forward.padded else [rest.shape[1]] * len(rest)
    gate = None if gate is None else torch.nn.functional.pad(gate, (0, rest.shape[1]), value=1.0)
    return torch.cat([keep, rest], 1), tuple(n + added for n, added in zip(counts, more)), gate


def _replay(run: BlockRun, real: Tensor, part: str, longer: bool) -> tuple[Tensor, tuple[int, ...]]:
    """What a FixedRouter says; read on the host where there is no padding, so that no device is asked."""
    router, forward = run.attached.pruner.router, run.forward
    assert isinstance(router, FixedRouter)
    keep = router.decision(run.index, real, part, past=forward.past, longer=longer)
    if forward.padded:
        return keep, tuple(keep.sum(1).tolist())
    past, tokens = (forward.past, real.shape[1]) if longer else (0, None)
    return keep, router.host_counts(run.index, len(real), part, past=past, tokens=tokens)


def _prompt_context(run: BlockRun, part: str) -> RoutingContext:
    forward, routed, schedule = run.forward, run.routed, run.attached.pruner.scheduled.sparsity
    scores = None if forward.table is None else forward.table.own.to(forward.home)
    return RoutingContext(
        run.index, schedule[run.index], routed.real, routed.position, forward.lengths,
        forward.kept[run.index][:, None], scores, _for_router(run, run.call.hidden[:, : routed.real.shape[1]]),
        schedule=schedule, part=part, padded=forward.padded, memo=forward.memo, entered=forward.entered,
        scouted=forward.scouted,
    )  # fmt: skip


def _for_router(run: BlockRun, hidden: Tensor) -> Tensor:
    """Hidden states where routers decide, if this one reads them."""
    return hidden.to(run.forward.home) if run.attached.pruner.router.needs.hidden else hidden


# ---------------------------------------------------------------- continuation tokens, under a decode policy


def _follow(run: BlockRun, part: str) -> tuple[Kept, None]:
    """The decision about continuation tokens, each by what is known up to itself. Asks the device how many skip."""
    pruner, forward = run.attached.pruner, run.forward
    if isinstance(pruner.router, FixedRouter):
        return Kept(*_replay(run, forward.real, part, longer=True)), None
    with torch.no_grad():
        probability = pruner.router.probability(_continuation_context(run, part)).to(forward.real.device)
    if pruner.decode == "threshold":
        skips = policies.below_threshold(probability, forward.real, pruner.threshold)
    else:
        layer = run.routed_layer(complete=pruner.kv[run.index] == "keep")
        assert layer is not None  # a continuation has a cache
        account = policies.account_of(layer, part, forward.real, forward.past)
        sparsity = pruner.scheduled.sparsity[run.index]
        skips = policies.within_allowance(probability, forward.real, sparsity, account)
        policies.enter(layer, part, account, skips, forward.real)
    keep = forward.real & ~skips
    return Kept(keep, keep.sum(1).tolist()), None


def _continuation_context(run: BlockRun, part: str) -> RoutingContext:
    """Token i of a row has T_i = i + 1 tokens: itself, the last, and those before it (method.md, section 4)."""
    forward, schedule = run.forward, run.attached.pruner.scheduled.sparsity
    real, position = forward.real.to(forward.home), forward.position.to(forward.home)
    counts = [[kept_tokens(n, schedule[run.index], reserved_tokens(n)) for n in row] for row in forward.host_lengths]
    own = rank = None
    if isinstance(forward.table, ContinuationTable):
        own, rank = forward.table.own.to(forward.home), forward.table.rank.to(forward.home)
    return RoutingContext(
        run.index, schedule[run.index], real, position, position + 1, torch.tensor(counts, device=forward.home), own,
        _for_router(run, run.call.hidden), rank=rank, schedule=schedule, part=part, padded=forward.padded,
        memo=forward.memo,
    )  # fmt: skip
