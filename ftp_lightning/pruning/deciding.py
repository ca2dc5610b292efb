"""Asking the router: which of the new tokens enter a block.

Shapes: B rows, T new tokens, P routed ones, N blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.pruning import policies
from ftp_lightning.pruning.calls import Call
from ftp_lightning.pruning.kept import Rows
from ftp_lightning.pruning.state import Chosen, Decision
from ftp_lightning.routing.base import RoutingContext
from ftp_lightning.routing.choice import choose_threshold, choose_topk
from ftp_lightning.routing.fixed import FixedRouter
from ftp_lightning.schedule import kept_tokens

if TYPE_CHECKING:
    from ftp_lightning.pruning.engine import Engine

_PARTS = {"block": ("block",), "attention": ("attention",), "mlp": ("mlp",), "attention+mlp": ("attention", "mlp")}
PARTS = tuple(_PARTS)
"""What a decision may address: whole blocks, one of their parts, or both parts apart."""


def choose(engine: Engine, index: int, call: Call) -> Chosen | None:
    """What this block does with the new tokens; None where it computes all of them."""
    state = engine.running
    if gone := engine.pruner.removed_parts(index):
        return _without(engine, index, call, gone)
    if not engine.is_routed(index) or (state.part is None and not state.follows):
        return None
    decide = _follow if state.part is None else _route
    if not engine.decides_parts:
        rows, gate = decide(engine, index, call, "block")
        return None if rows.whole and not state.masked else Chosen(rows, rows, (gate, gate))
    decided = {part: decide(engine, index, call, part) for part in _parts(engine)}
    decided = {part: found for part, found in decided.items() if state.masked or not found[0].whole}
    (attention, first), (mlp, second) = (decided.get(part, (None, None)) for part in ("attention", "mlp"))
    return Chosen(attention, mlp, (first, second)) if decided else None


def _without(engine: Engine, index: int, call: Call, gone: frozenset[str]) -> Chosen:
    """A block of which something is removed: nothing enters that, prompt or continuation; the rest is decided as
    ever, a decision about whole blocks being one about what is left of this one."""
    state = engine.running
    nothing = Rows(torch.zeros_like(state.real), (0,) * len(state.real))
    if len(gone) == 2:
        apart = engine.decides_parts  # then each part gets what `skip` says of it
        return Chosen(nothing, Rows(nothing.keep.clone(), nothing.counts) if apart else nothing)
    left = "mlp" if "attention" in gone else "attention"
    rows, gate = None, None
    if engine.is_routed(index) and (state.part is not None or state.follows):
        asked = left if engine.decides_parts else "block"
        if asked == "block" or asked in _parts(engine):
            rows, gate = (_follow if state.part is None else _route)(engine, index, call, asked)
            rows = None if rows.whole and not state.masked else rows
    pairs = {left: (rows, gate), next(iter(gone)): (nothing, None)}
    (attention, first), (mlp, second) = pairs["attention"], pairs["mlp"]
    return Chosen(attention, mlp, (first, second))


def _parts(engine: Engine) -> tuple[str, ...]:
    fixed = isinstance(engine.pruner.router, FixedRouter)
    return ("attention", "mlp") if fixed else _PARTS[engine.pruner.parts]


def _route(engine: Engine, index: int, call: Call, part: str) -> tuple[Rows, Tensor | None]:
    """The decision about routed tokens; with the training executor also that the rest is computed, and p_compute."""
    pruner, state = engine.pruner, engine.running
    routed, hidden = state.part, call.hidden[:, : state.part.real.shape[1]]
    gate = None
    if isinstance(pruner.router, FixedRouter):
        keep, kept = _replay(engine, index, routed.real, part, longer=pruner.decode != "dense")
    else:
        context = _prompt_context(engine, index, hidden, part)
        by_rank = pruner.choice == "topk"
        probability = pruner.router.probability(context) if state.masked or not by_rank else None
        gate = pruner.gates.relax(probability) if state.masked else None
        if by_rank:
            kept = state.counts[index]
            with torch.no_grad():
                score = pruner.router.score(context) if gate is None or gate is probability else gate
                keep = choose_topk(score, routed, kept, context.kept)
        else:
            keep = choose_threshold((probability if gate is None else gate).detach(), routed, pruner.threshold)
            kept = tuple(keep.sum(1).tolist())
        state.entered = keep
        if state.masked:
            state.decisions.append(Decision(probability, keep, routed, context))
            gate = torch.where(routed.reserved, 1.0, gate)  # always computed: nothing to learn from
    keep, gate = keep.to(state.real.device), None if gate is None else gate.to(state.real.device)
    if state.masked:
        tail = state.real[:, routed.real.shape[1] :]
        after = tail.sum(1).tolist() if state.padded else [tail.shape[1]] * len(tail)
        keep, kept = torch.cat([keep, tail], 1), tuple(n + more for n, more in zip(kept, after))
        gate = None if gate is None else torch.nn.functional.pad(gate, (0, tail.shape[1]), value=1.0)
    return Rows(keep, kept), gate


def _replay(engine: Engine, index: int, real: Tensor, part: str, longer: bool) -> tuple[Tensor, tuple[int, ...]]:
    """What a FixedRouter says; read on the host where there is no padding, so that no device is asked."""
    router, state = engine.pruner.router, engine.running
    keep = router.decision(index, real, part, past=state.past, longer=longer)
    if state.padded:
        return keep, tuple(keep.sum(1).tolist())
    past, tokens = (state.past, real.shape[1]) if longer else (0, None)
    return keep, router.host_counts(index, len(real), part, past=past, tokens=tokens)


def _prompt_context(engine: Engine, index: int, hidden: Tensor, part: str) -> RoutingContext:
    state, schedule = engine.running, engine.pruner.schedule.sparsity
    routed, table = state.part, None if state.table is None else state.table.own.to(state.home)
    hidden = _for_router(engine, hidden)
    return RoutingContext(
        index, schedule[index], routed.real, routed.position, state.lengths, state.kept[index][:, None], table, hidden,
        schedule=schedule, part=part, padded=state.padded, memo=state.memo, entered=state.entered,
        scouted=state.scouted,
    )  # fmt: skip


def _for_router(engine: Engine, hidden: Tensor) -> Tensor:
    """Hidden states where routers decide, if this one reads them."""
    return hidden.to(engine.running.home) if engine.pruner.router.needs_hidden else hidden


# ---------------------------------------------------------------- continuation tokens, under a decode policy


def _follow(engine: Engine, index: int, call: Call, part: str) -> tuple[Rows, None]:
    """The decision about continuation tokens, each by what is known up to itself. Asks the device how many skip."""
    pruner, state = engine.pruner, engine.running
    if isinstance(pruner.router, FixedRouter):
        return Rows(*_replay(engine, index, state.real, part, longer=True)), None
    with torch.no_grad():
        context = _continuation_context(engine, index, call.hidden, part)
        probability = pruner.router.probability(context).to(state.real.device)
    if pruner.decode == "threshold":
        skips = policies.below_threshold(probability, state.real, pruner.threshold)
    else:
        layer = engine.routed_layer(call.cache, index, pruner.kv[index] == "keep")
        account = policies.account_of(layer, part, state.real, state.past)
        skips = policies.within_allowance(probability, state.real, engine.sparsity(index), account)
        policies.enter(layer, part, account, skips, state.real)
    keep = state.real & ~skips
    return Rows(keep, keep.sum(1).tolist()), None


def _continuation_context(engine: Engine, index: int, hidden: Tensor, part: str) -> RoutingContext:
    """Token i of a row has T_i = i + 1 tokens: itself, the last, and those before it (method.md, section 4)."""
    state, schedule = engine.running, engine.pruner.schedule.sparsity
    real, position = state.real.to(state.home), state.position.to(state.home)
    kept = [[kept_tokens(n, schedule[index], min(2, n)) for n in row] for row in state.host_lengths]
    table = state.table
    own, rank = (None, None) if table is None else (table.own.to(state.home), table.rank.to(state.home))
    return RoutingContext(
        index, schedule[index], real, position, position + 1, torch.tensor(kept, device=state.home), own,
        _for_router(engine, hidden), rank=rank, schedule=schedule, part=part, padded=state.padded, memo=state.memo,
    )  # fmt: skip
