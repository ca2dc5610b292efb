"""A block in the training forward: all tokens run, so that every gate has a gradient; its value is that of inference.

Shapes: B rows, T tokens, P routed ones, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ftp_lightning.pruning.attention import Sight, tap_attention
from ftp_lightning.pruning.decide import prompt_context, route
from ftp_lightning.pruning.kept import Call, Kept, Tokens, tensor_of
from ftp_lightning.pruning.scores import write_scores
from ftp_lightning.pruning.trace import Routing
from ftp_lightning.routing.fixed import FixedRouter

if TYPE_CHECKING:
    from ftp_lightning.pruning.block_run import BlockRun


def decided_with_gate(run: BlockRun, part: str) -> tuple[Kept, Tensor | None]:
    """The decision about all tokens of a training forward, those after the routed ones computed, and p_compute (B, T)
    with gradient; None where no router is asked for one."""
    pruner, forward, routed = run.attached.pruner, run.forward, run.forward.routed
    assert forward.training is not None and routed is not None
    gate = None
    if isinstance(pruner.router, FixedRouter):
        kept, _ = route(run, part)
    else:
        context = prompt_context(run, part)
        probability = pruner.router.probability(context)
        gate = forward.training.gates.relax(probability)
        kept, _ = route(run, part, None if gate is probability and pruner.choice == "topk" else gate)
        assert forward.entered is not None
        forward.routings.append(Routing(probability, forward.entered, routed, context))
        gate = torch.where(routed.reserved, 1.0, gate)  # always computed: nothing to learn from
        width = forward.real.shape[1] - gate.shape[1]
        gate = torch.nn.functional.pad(gate.to(forward.real.device), (0, width), value=1.0)
    rest = forward.real[:, kept.keep.shape[1] :]
    more = rest.sum(1).tolist() if forward.padded else [rest.shape[1]] * len(rest)
    return Kept(torch.cat([kept.keep, rest], 1), [n + added for n, added in zip(kept.counts, more)]), gate


def run_with_gates(run: BlockRun, inner, call: Call, part: str):
    """What `inner` (a block, or its attention) returns: (B, T, D) of all tokens, blended with what skipped ones get, or
    a tuple that begins with it.

    Under `evict` keys of skipped tokens are hidden from all but themselves. What is computed for a skipped token is
    used for its gate's gradient alone. Tokens after the routed ones are all computed, as a continuation is.
    """
    forward, window, decision = run.forward, run.plan.site.window, run.decision
    assert forward.training is not None and decision is not None and decision.attention is not None
    keep, gate, gates = decision.attention.keep, decision.gates[0], forward.training.gates
    slots, evicts, more = forward.new.slots, not run.plan.keeps, {}
    keys = Tokens(slots, keep if evicts else forward.real, False)
    if evicts and gates.keys and gate is not None:
        more = {"real": forward.real, "key_gates": gate}
    run.sight = Sight(Tokens(slots, forward.real, False), keys, window, slots.shape[1], themselves=True, **more)
    output = inner(**call.at(None, None))
    run.sight = None
    if run.tapped is not None:
        write_scores(run, None, Tokens(slots, keep, False), keys, None)
    computed, base = output if part == "block" else output[0], run.skipped(call.hidden, part)
    blended = gates.blend(tensor_of(computed), base, keep, gate)
    return blended if part == "block" else (blended, None)


def recomputed(run: BlockRun, inner, *args, **kwargs):
    """`inner` (a block) under activation checkpointing: backward runs it again, seeing what it saw, in whichever thread
    that is, also where the pruner is detached by then."""
    attached, sight = run.attached, run.sight

    def once_more(*args, **kwargs):
        ambient = attached.ambient
        if ambient.forward is run.forward:  # forward: as it is
            return inner(*args, **kwargs)
        before = run.sight, run.forward.run
        run.sight, run.forward.run = sight, run
        undo = tap_attention(run.plan.site.attention, attached.taps[run.plan.index])  # also of another pruner by now
        try:
            with ambient.having(forward=run.forward):
                return inner(*args, **kwargs)
        finally:
            undo()
            run.tapped = None  # nobody reads what the attention said
            run.sight, run.forward.run = before

    drops = any(module.training for module in attached.blocks[run.plan.index].modules())  # dropout has to drop the same
    return checkpoint(once_more, *args, use_reentrant=False, preserve_rng_state=drops, **kwargs)
