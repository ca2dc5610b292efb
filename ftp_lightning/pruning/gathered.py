"""The gathered executor: a block run on the kept rows, on new keys and values put where they belong.

Shapes: B rows, T new tokens, K kept tokens of the fullest row, G key heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.attention import Tokens
from ftp_lightning.pruning.cache import Deposited, DepositPort, Port, RoutedLayer
from ftp_lightning.pruning.calls import BlockCall, gather_index, put_rows, take_rows
from ftp_lightning.pruning.masks import attention_mask

if TYPE_CHECKING:
    from ftp_lightning.pruning.engine import Engine


def run_gathered(engine: Engine, index: int, inner, call: BlockCall) -> Tensor:
    """Rows gathered, the block run on them, rows scattered back; skipped rows get `skip`. (B, T, hidden)."""
    state, hidden, mode = engine.current, call.hidden, engine.pruner.kv[index]
    keep, kept = engine.decide(index, hidden)
    state.trace.keep.append(keep)
    even = len(set(kept)) == 1
    index_BK, valid = gather_index(keep, max(kept))
    queries = Tokens(index_BK + state.past, valid, even)
    if mode == "keep":
        port, keys = _keep_port(engine, index, inner, call, keep, index_BK, even)
    else:
        port, keys = _evict_port(engine, index, inner, call, queries)
    base = engine.pruner.skip_function(hidden, index)
    if not index_BK.shape[1]:
        return base
    mask = attention_mask(engine.sites[index], state, queries, keys, hidden.dtype)
    rows = call.run(inner, **call.rows(index_BK), attention_mask=mask, cache=port)
    if not even:
        rows = torch.where(valid[..., None], rows, take_rows(base, index_BK))
    engine.write_scores(queries, keys, index_BK if mode == "evict" else None)
    return put_rows(base, index_BK, rows)


def run_continuation(engine: Engine, index: int, inner, call: BlockCall) -> Tensor:
    """New tokens on a filled cache, all computed (decode policy `dense`)."""
    layer = engine.layer(call.cache, index)
    if not isinstance(layer, RoutedLayer):
        return call.run(inner)
    new = engine.current.new

    def store(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        layer.append(keys, values, new, new.slots.shape[1])
        return layer.keys, layer.values

    if layer.complete:  # stored as seen: the model's own mask fits
        return call.run(inner, cache=Port(call.cache, store))
    keys = layer.tokens.followed_by(new)
    mask = attention_mask(engine.sites[index], engine.current, new, keys, call.hidden.dtype)
    return call.run(inner, cache=Port(call.cache, store), attention_mask=mask)


def _evict_port(engine: Engine, index: int, inner, call: BlockCall, queries: Tokens) -> tuple[Port | None, Tokens]:
    """Skipped tokens give no key and no value: the cache gets the kept ones. And the keys that the queries may see."""
    seen = engine.current.real.shape[1]
    layer = engine.routed_layer(call.cache, index, complete=False)
    if layer is None:
        return None, queries
    if not queries.slots.shape[1]:  # nothing is kept in any row: the layer learns its shape, and how much was seen
        first = engine.current.new.slots[:, :1] - engine.current.past
        keys, values = _deposit(engine, index, inner, call, first)
        layer.append(keys[:, :, :0], values[:, :, :0], queries, seen)
    keys = layer.tokens.followed_by(queries) if layer.seen else queries

    def store(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        layer.append(k, v, queries, seen)
        return layer.keys, layer.values

    return Port(call.cache, store), keys


def _keep_port(
    engine: Engine, index: int, inner, call: BlockCall, keep: Tensor, index_BK: Tensor, even: bool
) -> tuple[Port, Tokens]:
    """Keys and values for all tokens: those of the skipped ones are deposited first, then merged in order."""
    state, tokens = engine.current, keep.shape[1]
    layer = engine.routed_layer(call.cache, index, complete=True) or RoutedLayer(complete=True)
    # rows alike: kept and skipped tokens make up the row; else a deposit for every token, and the kept ones replaced
    rest = gather_index(~keep, tokens - index_BK.shape[1])[0] if even else None
    deposit = _deposit(engine, index, inner, call, rest)
    new = state.new

    def store(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        merged = (_merge(fresh, old, index_BK, rest, keep) for fresh, old in zip((k, v), deposit))
        layer.append(*merged, new, tokens)
        return layer.keys, layer.values

    if not index_BK.shape[1]:
        layer.append(*deposit, new, tokens)
    return Port(call.cache, store), state.seen


def _deposit(engine: Engine, index: int, inner, call: BlockCall, rest: Tensor | None):
    """Keys and values (B, G, R, D) of the tokens `rest` (B, R), or of all tokens: the block is run up to its cache."""
    if rest is not None and rest.shape[1] == 0:
        return None, None
    port = DepositPort(call.cache)
    engine.depositing = True
    try:
        call.run(inner, **(call.rows(rest) if rest is not None else {}), attention_mask=None, cache=port)
    except Deposited:
        return port.keys, port.values
    finally:
        engine.depositing = False
    raise UserError(f"block {index} did not hand keys and values to its cache: this model cannot be pruned this way.")


def _merge(new: Tensor, deposited: Tensor | None, index_BK: Tensor, rest: Tensor | None, keep: Tensor) -> Tensor:
    """Keys (or values) of all tokens in order: `new` (B, G, K, D) at index_BK, `deposited` at `rest` (or
    everywhere)."""
    if deposited is None:
        return _in_order(new, index_BK)
    if rest is not None:
        return _in_order(torch.cat([new, deposited], 2), torch.cat([index_BK, rest], 1))
    valid = keep.gather(1, index_BK)[:, None, :, None]
    at = index_BK[:, None, :, None].expand_as(new)
    return deposited.scatter(2, at, torch.where(valid, new, deposited.gather(2, at)))


def _in_order(x: Tensor, tokens: Tensor) -> Tensor:
    """x (B, G, T, D), whose entry j belongs to token tokens[:, j], in ascending order of tokens."""
    inverse = tokens.argsort(dim=1)
    if inverse.shape[0] == 1:
        return x.index_select(2, inverse[0])
    return x.gather(2, inverse[:, None, :, None].expand_as(x))
