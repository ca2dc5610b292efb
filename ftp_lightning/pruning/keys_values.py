"""Keys and values of a block of which some tokens skip: they are made once, for the tokens that are to be stored.

`evict`: the kept tokens give theirs as the block runs. `keep`: the block is run up to its cache for all tokens, with
its query projection silent, and the keys and values are stored as they come; then it runs on the kept tokens with its
key and value projections silent, and reads what is stored.

Shapes: B rows, T new tokens, K kept ones, G key heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.cache import Deposited, DepositPort, Port, RoutedLayer
from ftp_lightning.pruning.calls import Call
from ftp_lightning.pruning.kept import Kept, Tokens

if TYPE_CHECKING:
    from ftp_lightning.pruning.block_run import BlockRun


@dataclass(frozen=True)
class Storing:
    """What stands for the cache while tokens run, the keys that they may see, and the cache's layer."""

    cache: object
    keys: Tokens
    layer: RoutedLayer | None


def evicting(run: BlockRun, inner, call: Call, kept: Kept, layer: RoutedLayer | None, read: Kept | None) -> Storing:
    """Skipped tokens give no key and no value. read: of the kept tokens those that run; None: all of them."""
    own = Tokens(kept.index + run.forward.past, kept.valid, kept.even)
    seen = kept.keep.shape[1]
    if read is not None and kept.width:
        layer = RoutedLayer(False) if layer is None else layer  # without a cache it lives for this call alone
        layer.complete = False
        visible = layer.tokens.followed_by(own) if layer.is_initialized else own
        return Storing(
            _filled(run, call, layer.append(*_deposit(run, inner, call, kept.index), own, seen)), visible, layer
        )
    if layer is None:
        return Storing(None, own, None)
    layer.complete = False
    if kept.width:
        visible = layer.tokens.followed_by(own) if layer.is_initialized else own
        layer.expect(own, seen)
        return Storing(call.cache, visible, layer)
    if layer.is_initialized:
        layer.skip(seen)
    else:  # nothing is kept in any row: the layer learns its shape, and how much was seen
        first = run.forward.new.slots[:, :1] - run.forward.past
        keys, values = _deposit(run, inner, call, first)
        layer.append(keys[:, :, :0], values[:, :, :0], own, seen)
    return Storing(call.cache, own, layer)


def keeping(run: BlockRun, inner, call: Call, kept: Kept, layer: RoutedLayer | None) -> Storing:
    """All tokens give keys and values, in order."""
    layer = RoutedLayer(True) if layer is None else layer  # without a cache it lives for this call alone
    new, tokens = run.forward.new, kept.keep.shape[1]
    visible = layer.tokens.followed_by(new) if layer.is_initialized else new
    if run.site.key_value or not kept.width:
        found = layer.append(*_deposit(run, inner, call, None), new, tokens)
        return Storing(_filled(run, call, found), visible, layer)
    # fused with the queries: the kept tokens' come again as the block runs, so that the others' alone are made first
    others = kept.rest.index if kept.even else None
    first = None if kept.whole else _deposit(run, inner, call, others)

    def store(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if first is not None:
            keys, values = (_merged(kept, own, old) for own, old in zip((keys, values), first))
        return layer.append(keys, values, new, tokens)

    return Storing(Port(call.cache, store), visible, layer)


def _filled(run: BlockRun, call: Call, found: tuple[Tensor, Tensor]) -> Port:
    """A cache that has the keys and values already; what the block's own projections give is not wanted."""
    run.silent = "key_value"
    return Port(call.cache, lambda keys, values: found)


def _deposit(run: BlockRun, inner, call: Call, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values (B, G, n, D) of the tokens `index` (B, n), or of all: `inner` is run up to its cache."""
    port, attached = DepositPort(call.cache), run.attached
    run.silent = "query"
    try:
        call.run(inner, **(call.at(index) if index is not None else {}), attention_mask=None, cache=port)
    except Deposited:
        return port.keys, port.values
    except RuntimeError as error:
        if run.index in attached.full_queries or isinstance(error, torch.OutOfMemoryError):
            raise
        attached.full_queries.add(run.index)  # a norm over all heads (OLMo-2), or a view by their number (OPT)
        return _deposit(run, inner, call, index)
    finally:
        run.silent = ""
    raise UserError(f"block {run.index} gave its cache no keys and values: this model cannot be pruned this way.")


def _merged(kept: Kept, own: Tensor, others: Tensor) -> Tensor:
    """Keys (or values) (B, G, T, D) of all tokens in order: `own` (B, G, K, D) where tokens are kept, `others`
    elsewhere. A token's heads stay side by side in memory, as the projections leave them."""
    own, others = own.transpose(1, 2), others.transpose(1, 2)
    if kept.even:
        merged = kept.join(own, others)
    else:
        merged = kept.put(others.flatten(2), own.flatten(2)).view_as(others)
    return merged.transpose(1, 2)
