"""The gathered executor: a block run on the kept rows, on new keys and values put where they belong.

Shapes: B rows, T new tokens, K kept tokens of the fullest row, G key heads, S keys, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.attention import Sight
from ftp_lightning.pruning.cache import Deposited, DepositPort, Port, RoutedLayer
from ftp_lightning.pruning.calls import Call, tensor_of
from ftp_lightning.pruning.kept import Rows, Tokens
from ftp_lightning.pruning.state import Chosen

if TYPE_CHECKING:
    from ftp_lightning.pruning.engine import Engine


def run_gathered(engine: Engine, index: int, inner, call: Call, chosen: Chosen) -> Tensor:
    """Rows gathered, the block run on them, rows scattered back; skipped rows get what `skip` says. (B, T, hidden)."""
    rows = chosen.attention
    assert rows is not None  # of a whole block both parts are one
    engine.running.trace.add(rows.keep, rows.keep)
    output = run_rows(engine, index, inner, call, rows)
    return scattered(engine, index, "block", call.hidden, rows, None if output is None else tensor_of(output))


def scattered(engine: Engine, index: int, part: str, hidden: Tensor, rows: Rows, computed: Tensor | None) -> Tensor:
    """(B, T, D): `computed` (B, K, D) for the kept rows, what `skip` says for the others, from hidden (B, T, D).

    A compensation is computed for the skipped rows alone where rows are even, else for all of them.
    """
    if computed is not None and rows.even and engine.pruner.compensation is not None:
        return rows.join(computed, engine.skipped(rows.rest.take(hidden), index, part))
    base = engine.skipped(hidden, index, part)
    return base if computed is None else rows.put(base, computed)


def run_rows(engine: Engine, index: int, inner, call: Call, rows: Rows):
    """What `inner` (a block, or its attention) returns for the kept rows; None where no row keeps a token.

    Whatever a skipped token leaves behind in the cache (`keep`: its key and value; `evict`: that it was seen) is there
    afterwards.
    """
    state = engine.running
    queries = Tokens(rows.index + state.past, rows.valid, rows.even)
    complete = engine.pruner.kv[index] == "keep"
    layer = engine.routed_layer(call.cache, index, complete)
    cache: object
    if complete:
        layer = RoutedLayer(True) if layer is None else layer  # without a cache it lives for this call alone
        cache, keys = _keep(engine, index, inner, call, rows, layer)
    else:
        cache, keys = _evict(engine, index, inner, call, rows, queries, layer)
    if not rows.width:
        engine.recall_scores(index, layer)
        return None
    engine.sight = _sight(engine, index, queries, keys, layer)
    output = call.run(inner, **call.rows(rows.index), attention_mask=None, cache=cache)
    engine.sight = None
    engine.write_scores(rows, queries, keys, layer)
    return output


def _sight(engine: Engine, index: int, queries: Tokens, keys: Tokens, layer: RoutedLayer | None) -> Sight:
    state, window = engine.running, engine.sites[index].window
    unbounded = window is None or state.span <= window
    plain = unbounded and keys.all_valid and queries.all_valid
    single = state.real.shape[1] == 1  # one query out of several new tokens must not see what comes after it
    complete = layer is not None and layer.complete
    new = state.real.shape[1] if engine.pruner.kv[index] == "keep" else queries.slots.shape[1]
    return Sight(
        queries, keys, None if unbounded else window, new,
        causal=plain and keys is queries, everything=plain and single, complete=complete,
    )  # fmt: skip


def _evict(
    engine: Engine, index: int, inner, call: Call, rows: Rows, queries: Tokens, layer: RoutedLayer | None
) -> tuple[object, Tokens]:
    """Skipped tokens give no key and no value: the cache gets the kept ones. And the keys that the queries may see."""
    if layer is None:
        return None, queries
    seen = rows.keep.shape[1]
    layer.complete = False
    if rows.width:
        keys = layer.tokens.followed_by(queries) if layer.is_initialized else queries
        layer.expect(queries, seen)
        return call.cache, keys
    if layer.is_initialized:
        layer.skip(seen)
    else:  # nothing is kept in any row: the layer learns its shape, and how much was seen
        first = engine.running.new.slots[:, :1] - engine.running.past
        keys, values = _deposit(engine, index, inner, call, first)
        layer.append(keys[:, :, :0], values[:, :, :0], queries, seen)
    return call.cache, queries


def _keep(engine: Engine, index: int, inner, call: Call, rows: Rows, layer: RoutedLayer) -> tuple[Port, Tokens]:
    """Keys and values for all tokens: those of the skipped ones are deposited first, then merged in order."""
    new, tokens = engine.running.new, rows.keep.shape[1]
    if not rows.width:
        layer.append(*_deposit(engine, index, inner, call, None), new, tokens)
        return Port(call.cache, None), new
    # rows alike: kept and skipped tokens make up the row; else a deposit for every token, and the kept ones replaced
    rest = rows.rest.index if rows.even else None
    deposited = None if rows.whole else _deposit(engine, index, inner, call, rest)
    keys = layer.tokens.followed_by(new) if layer.is_initialized else new

    def store(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if deposited is not None:
            k, v = (_merge(rows, fresh, old) for fresh, old in zip((k, v), deposited))
        return layer.append(k, v, new, tokens)

    return Port(call.cache, store), keys


def _deposit(engine: Engine, index: int, inner, call: Call, rest: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values (B, G, R, D) of the tokens `rest` (B, R), or of all tokens: `inner` is run up to its cache."""
    port = DepositPort(call.cache)
    engine.depositing = True
    try:
        call.run(inner, **(call.rows(rest) if rest is not None else {}), attention_mask=None, cache=port)
    except Deposited:
        return port.keys, port.values
    except RuntimeError as error:
        if index in engine.needs_full_queries or isinstance(error, torch.OutOfMemoryError):
            raise
        engine.needs_full_queries.add(index)  # a norm over all heads (OLMo-2), or a view by their number (OPT)
        return _deposit(engine, index, inner, call, rest)
    finally:
        engine.depositing = False
    raise UserError(f"block {index} did not hand keys and values to its cache: this model cannot be pruned this way.")


def _merge(rows: Rows, fresh: Tensor, deposited: Tensor) -> Tensor:
    """Keys (or values) (B, G, T, D) of all tokens in order: `fresh` (B, G, K, D) where tokens are kept, `deposited`
    elsewhere. A token's heads stay side by side in memory, as the projections leave them."""
    fresh, deposited = fresh.transpose(1, 2), deposited.transpose(1, 2)
    if rows.even:
        merged = rows.join(fresh, deposited)
    else:
        merged = rows.put(deposited.flatten(2), fresh.flatten(2)).view_as(deposited)
    return merged.transpose(1, 2)
