"""The masked executor: all rows run, so that every gate has a gradient; its forward value is the gathered
executor's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.pruning.attention import Tokens
from ftp_lightning.pruning.calls import BlockCall
from ftp_lightning.pruning.masks import attention_mask
from ftp_lightning.routing.fixed import FixedRouter

if TYPE_CHECKING:
    from ftp_lightning.pruning.engine import Engine


def run_masked(engine: Engine, index: int, inner, call: BlockCall) -> Tensor:
    """keep * block(x) + (1 - keep) * skip(x), with a straight-through gate: d/dp = block(x) - skip(x).

    Under `evict` keys of skipped tokens are hidden from all but themselves. What a skipped token's row computes is used
    for its gate's gradient alone. Tokens after the routed part are all computed, as a continuation is. (B, T, hidden).
    """
    state, hidden = engine.current, call.hidden
    routed = state.part.real.shape[1]
    keep, _ = engine.decide(index, hidden[:, :routed])
    tail = state.real[:, routed:]
    whole = torch.cat([keep, tail], 1)
    state.trace.keep.append(whole)
    slots = state.new.slots
    keys = Tokens(slots, whole if engine.pruner.kv[index] == "evict" else state.real, False)
    queries = Tokens(slots, state.real, False)
    mask = attention_mask(engine.sites[index], state, queries, keys, hidden.dtype, themselves=True)
    rows = call.run(inner, attention_mask=mask, cache=None)
    engine.write_scores(Tokens(slots, whole, False), keys, None)
    base = engine.pruner.skip_function(hidden, index)
    output = torch.where(whole[..., None], rows, base)
    if isinstance(engine.pruner.router, FixedRouter):
        return output
    probability = state.decisions[-1].probability
    gate = torch.cat([probability - probability.detach(), torch.zeros_like(tail, dtype=probability.dtype)], 1)
    return output + (gate[..., None] * (rows - base).detach()).to(output.dtype)
