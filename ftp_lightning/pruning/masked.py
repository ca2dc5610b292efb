"""The masked executor: all rows run, so that every gate has a gradient; its forward value is the gathered
executor's."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ftp_lightning.pruning.attention import Sight, is_tapped, tap_attention
from ftp_lightning.pruning.calls import Call, tensor_of
from ftp_lightning.pruning.kept import Tokens
from ftp_lightning.pruning.state import Chosen

if TYPE_CHECKING:
    from ftp_lightning.pruning.engine import Engine


def run_masked(engine: Engine, index: int, inner, call: Call, chosen: Chosen) -> Tensor:
    """keep * block(x) + (1 - keep) * skip(x), with the gradient that the gates give.

    What a skipped token's row computes is used for its gate's gradient alone. Tokens after the routed part are all
    computed, as a continuation is. (B, T, hidden).
    """
    assert chosen.attention is not None  # of a whole block both parts are one
    keep = chosen.attention.keep
    engine.running.trace.add(keep, keep)
    rows = tensor_of(run_all_rows(engine, index, inner, call, keep, chosen.gates[0]))
    return engine.pruner.gates.blend(rows, engine.skipped(call.hidden, index, "block"), keep, chosen.gates[0])


def run_all_rows(engine: Engine, index: int, inner, call: Call, keep: Tensor, gate: Tensor | None):
    """What `inner` (a block, or its attention) returns for all rows; under `evict` keys of skipped tokens are hidden
    from all but themselves."""
    state, window = engine.running, engine.sites[index].window
    slots, evicts, more = state.new.slots, engine.pruner.kv[index] == "evict", {}
    keys = Tokens(slots, keep if evicts else state.real, False)
    if evicts and engine.pruner.gates.keys and gate is not None:
        more = {"real": state.real, "key_gates": gate}
    engine.sight = Sight(Tokens(slots, state.real, False), keys, window, slots.shape[1], themselves=True, **more)
    output = call.run(inner, attention_mask=None, cache=None)
    engine.sight = None
    engine.write_scores(None, Tokens(slots, keep, False), keys, None)
    return output


def recomputed(engine: Engine, index: int, inner, *args, **kwargs):
    """`inner` (a block) under activation checkpointing: backward runs it again, seeing what it saw, also where the
    pruner is detached by then."""
    seen, attention = (engine.current, engine.sight), engine.sites[index].attention

    def run(*args, **kwargs):
        before = engine.current, engine.sight, engine.tapped
        engine.current, engine.sight = seen
        undo = None if is_tapped(attention) else tap_attention(attention, functools.partial(engine.attend, index))
        try:
            return inner(*args, **kwargs)
        finally:
            if undo is not None:
                undo()
            engine.current, engine.sight, tapped = before
            if engine.current is None:  # in backward nobody reads what the attention said
                engine.tapped = tapped

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
