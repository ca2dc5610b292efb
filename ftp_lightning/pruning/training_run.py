"""A block in the training forward: all tokens run, so that every gate has a gradient; its value is that of inference.

Shapes: B rows, T tokens, P routed ones, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ftp_lightning.pruning.attention import Sight
from ftp_lightning.pruning.calls import Call
from ftp_lightning.pruning.kept import Tokens
from ftp_lightning.pruning.said import write_scores

if TYPE_CHECKING:
    from ftp_lightning.pruning.block_run import BlockRun


def run_all_tokens(run: BlockRun, inner, call: Call, keep: Tensor, gate: Tensor | None):
    """What `inner` (a block, or its attention) returns for all tokens; under `evict` keys of skipped tokens are hidden
    from all but themselves.

    What is computed for a skipped token is used for its gate's gradient alone. Tokens after the routed ones are all
    computed, as a continuation is.
    """
    forward, window = run.forward, run.site.window
    assert forward.training is not None
    slots, evicts, more = forward.new.slots, run.attached.pruner.kv[run.index] == "evict", {}
    keys = Tokens(slots, keep if evicts else forward.real, False)
    if evicts and forward.training.gates.keys and gate is not None:
        more = {"real": forward.real, "key_gates": gate}
    run.sight = Sight(Tokens(slots, forward.real, False), keys, window, slots.shape[1], themselves=True, **more)
    output = call.run(inner, attention_mask=None, cache=None)
    run.sight = None
    write_scores(run, None, Tokens(slots, keep, False), keys, None)
    return output


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
        undo = attached.tap(run.index)  # also where another pruner is attached by now
        try:
            with ambient.having(forward=run.forward):
                return inner(*args, **kwargs)
        finally:
            undo()
            run.tapped = None  # nobody reads what the attention said
            run.sight, run.forward.run = before

    drops = any(module.training for module in attached.blocks[run.index].modules())  # dropout has to drop the same
    return checkpoint(once_more, *args, use_reentrant=False, preserve_rng_state=drops, **kwargs)
