"""The masked executor: all rows run, so that every gate has a gradient; its forward value is the gathered
executor's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.pruning.attention import Sight
from ftp_lightning.pruning.calls import Call, tensor_of
from ftp_lightning.pruning.state import Chosen
from ftp_lightning.pruning.tokens import Tokens

if TYPE_CHECKING:
    from ftp_lightning.pruning.engine import Engine


def run_masked(engine: Engine, index: int, inner, call: Call, chosen: Chosen) -> Tensor:
    """keep * block(x) + (1 - keep) * skip(x), with a straight-through gate: d/dp = block(x) - skip(x).

    What a skipped token's row computes is used for its gate's gradient alone. Tokens after the routed part are all
    computed, as a continuation is. (B, T, hidden).
    """
    keep = chosen.attention.keep
    engine.current.trace.add(keep, keep)
    rows = tensor_of(run_all_rows(engine, index, inner, call, keep))
    update = engine.pruner.skip_update(call.hidden, index, "block")
    base = call.hidden if update is None else call.hidden + update
    return gated(rows, base, keep, chosen.gates[0])


def run_all_rows(engine: Engine, index: int, inner, call: Call, keep: Tensor):
    """What `inner` (a block, or its attention) returns for all rows; under `evict` keys of skipped tokens are hidden
    from all but themselves."""
    state, window = engine.current, engine.sites[index].window
    slots = state.new.slots
    keys = Tokens(slots, keep if engine.pruner.kv[index] == "evict" else state.real, False)
    engine.sight = Sight(Tokens(slots, state.real, False), keys, window, slots.shape[1], themselves=True)
    output = call.run(inner, attention_mask=None, cache=None)
    engine.sight = None
    engine.write_scores(None, Tokens(slots, keep, False), keys, None)
    return output


def gated(rows: Tensor, base: Tensor, keep: Tensor, probability: Tensor | None) -> Tensor:
    """rows where keep, base elsewhere (B, T, D), with d/dp = rows - base for p_compute (B, P) of the routed tokens."""
    output = torch.where(keep[..., None], rows, base)
    if probability is None:
        return output
    gate = probability - probability.detach()
    tail = keep.shape[1] - gate.shape[1]
    gate = torch.nn.functional.pad(gate, (0, tail))
    return output + (gate[..., None] * (rows - base).detach()).to(output.dtype)
