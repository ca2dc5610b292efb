"""Keys and values of a block of which some tokens skip: how they are made, and the cache's layer that holds them.

`evict`: the kept tokens give theirs as the block runs. `keep`: the block is run up to its cache for all tokens, with
its query projection silent, and the keys and values are stored as they come; then it runs on the kept tokens with its
key and value projections silent, and reads what is stored. In both ways they are made once.

Shapes: B rows, T new tokens, K kept ones, G key heads, S stored entries, D head size, `seen` slots.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.kept import Call, Kept, Tokens

if TYPE_CHECKING:
    from ftp_lightning.pruning.block_run import BlockRun
    from ftp_lightning.pruning.score_log import ScoreLog


_CROPS_TO_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters


class RoutedLayer(DynamicLayer):
    """Stored entries have a slot (their place among all tokens seen, padding included) and a validity.

    `get_seq_length` and `get_mask_sizes` speak for all tokens *seen*: Hugging Face sizes position ids and masks by
    them. Under `evict` fewer entries are stored than seen; under `keep` all are, in order (`complete`). With a sliding
    `window` entries that no later query can see are dropped, as the stock layer does.

    The layer takes new keys and values only where a block run has said whose they are (`expected`: the tokens (B, n),
    and how many have been seen with them); a model without its pruner is refused.

    What routing of continuation tokens needs lives here too, by slot, so that beams reorder it and `crop` rolls it
    back: `scores`, the attention score that this block wrote last for every token, and those before (see `score_log`);
    and by part of the block `account` (B, seen) uint8 (see `policies`). Neither is there until a decode policy asks.
    """

    is_initialized: bool
    keys: Tensor
    values: Tensor

    def __init__(self, complete: bool, window: int | None = None):
        super().__init__()
        self.complete, self.window = complete, window
        self.is_sliding = window is not None
        self.record_past = False
        self.seen = 0
        self.all_valid = True
        self.expected: tuple[Tokens, int] | None = None
        self.scores: ScoreLog | None = None
        self.account: dict[str, Tensor] = {}
        self._slots: list[Tensor] = []
        self._valid: list[Tensor] = []

    @property
    def tokens(self) -> Tokens:
        """Which tokens are stored: slots and valid (B, S); only after the first `append`."""
        if len(self._slots) > 1:  # put together when they are asked for: a plain decode step never does
            self._slots, self._valid = [torch.cat(self._slots, 1)], [torch.cat(self._valid, 1)]
        return Tokens(self._slots[0], self._valid[0], self.all_valid)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Add the keys and values (B, G, n, D) of the expected tokens; returns all that their queries may see."""
        if self.expected is None:
            raise UserError(
                "this cache was filled by a TokenPruner and holds only the tokens each block computed.\n"
                "Use it while the pruner is attached, or start with a new cache."
            )
        (tokens, seen), self.expected = self.expected, None
        keys, values = key_states, value_states
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        elif self.keys.shape[2]:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        self._slots.append(tokens.slots)
        self._valid.append(tokens.valid)
        self.all_valid &= tokens.all_valid
        self.seen += seen
        if self.window is not None and not self.record_past:
            self._trim()
        return keys, values

    def skip(self, seen: int) -> None:
        """`seen` more tokens have been seen, none of them with a key in this block."""
        self.seen += seen

    def _trim(self) -> None:
        """Drop what no later query sees: of entries in slot order, all but the last window - 1.

        Fillers between entries spoil that count, so layers that are not complete keep theirs where rows are uneven.
        """
        last = (self.window or 1) - 1
        if self.keys.shape[2] <= last or not (self.complete or self.all_valid):
            return
        self.keys, self.values = self.keys[:, :, -last:], self.values[:, :, -last:]
        tokens = self.tokens
        self._slots, self._valid = [tokens.slots[:, -last:]], [tokens.valid[:, -last:]]

    @staticmethod
    def adopt(layer: CacheLayerMixin, complete: bool, window: int | None, real: Tensor | None) -> RoutedLayer:
        """The routed form of a stock layer that is empty or was filled densely; `real` (B, seen) marks padding."""
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UserError(
                f"token skipping needs a dynamic key-value cache; this one has a {type(layer).__name__}.\n"
                "Leave `cache_implementation` unset, or pass a DynamicCache."
            )
        # what the stock layer takes for unbounded (a cache made without a config) transformers sizes masks by
        routed = RoutedLayer(complete, window if isinstance(layer, DynamicSlidingWindowLayer) else None)
        routed.record_past = getattr(layer, "record_past", False)
        if layer.is_initialized and layer.get_seq_length():
            batch, _, stored, _ = layer.keys.shape
            seen = layer.get_seq_length()
            slots = torch.arange(seen - stored, seen, device=layer.keys.device).expand(batch, stored)
            valid = torch.ones_like(slots, dtype=torch.bool) if real is None else real[:, -stored:]
            routed.expected = Tokens(slots, valid, real is None), seen
            routed.update(layer.keys, layer.values)
        return routed

    # ---------------------------------------------------------------- what Hugging Face asks of a layer

    def activate_past_recording(self) -> None:
        """Keep entries beyond the window, so that `crop` can roll back (assisted decoding)."""
        self.record_past = True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.window is None:
            return self.seen + query_length, 0
        held = min(self.seen, self.window - 1)
        return held + query_length, self.seen - held

    def reset(self) -> None:
        """As before the first key."""
        fresh = RoutedLayer(True, self.window)
        fresh.record_past = self.record_past
        self.__dict__.update(fresh.__dict__)

    def _map_rows(self, change) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = change(self.keys), change(self.values)
        if self._slots:
            tokens = self.tokens  # put together: else every step would move the pieces of all steps before
            self._slots, self._valid = [change(tokens.slots)], [change(tokens.valid)]
        if self.scores is not None:
            self.scores.map(change)
        self.account = {part: change(account) for part, account in self.account.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda t: t[indices.to(t.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last |n| tokens seen (n <= 0, as Hugging Face calls it); for older versions of transformers n > 0
        are all that stay."""
        if _CROPS_TO_LENGTH and tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.seen)
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        if not self.is_initialized:
            return
        if tokens_to_remove and self.window is not None and not self.record_past and self.seen >= self.window:
            raise RuntimeError("this layer has dropped tokens beyond its window; call `activate_past_recording` first")
        if tokens_to_remove:
            self._drop_last(-tokens_to_remove)
        if self.window is not None:
            self._trim()

    def _drop_last(self, count: int) -> None:
        if self.scores is not None:
            self.scores.roll_back(self.seen - count)
        self.seen -= count
        tokens = self.tokens
        stay = tokens.slots < self.seen  # also fillers, which are invalid wherever they are
        places = stay.any(0).nonzero()
        width = int(places.max()) + 1 if len(places) else 0
        self.all_valid &= bool(stay[:, :width].all())
        self.keys, self.values = self.keys[:, :, :width], self.values[:, :, :width]
        slots = tokens.slots[:, :width].clamp(max=max(self.seen - 1, 0))  # what is left of the dropped ones is filler
        self._slots, self._valid = [slots], [(tokens.valid & stay)[:, :width]]
        self.account = {part: account[:, : self.seen] for part, account in self.account.items()}


# ---------------------------------------------------------------- making keys and values


class Deposited(Exception):
    """Raised by a `Port` once keys and values are in hand: the rest of the block is not wanted."""


@dataclass(eq=False)
class Port:
    """Stands in for the cache during one call of a block: takes the new keys and values, and gives `stored` in their
    place; without it the block ends there."""

    cache: Any
    stored: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.stored is None:
            self.stored = keys, values
            raise Deposited
        return self.stored

    def __getattr__(self, name):
        if name.startswith("__") or self.cache is None:
            raise AttributeError(f"the model asks the cache for `{name}`, but this forward has no cache")
        return getattr(self.cache, name)


class JoiningPort(Port):
    """Gives what `store` makes of the new keys and values."""

    store: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return self.store(keys, values)


Storing = tuple[Any, Tokens, RoutedLayer | None]
"""What stands for the cache while tokens run, the keys that they may see, and the cache's layer."""


def evicting(run: BlockRun, inner, call: Call, kept: Kept, layer: RoutedLayer | None, read: Kept | None) -> Storing:
    """Skipped tokens give no key and no value. read: of the kept tokens those that run; None: all of them."""
    own = Tokens(kept.index + run.forward.past, kept.valid, kept.even)
    seen = kept.keep.shape[1]
    if read is not None and kept.width:
        layer = RoutedLayer(False) if layer is None else layer  # without a cache it lives for this call alone
    if layer is None:
        return None, own, None
    layer.complete = False
    visible = layer.tokens.followed_by(own) if layer.is_initialized and kept.width else own
    if kept.width:
        layer.expected = own, seen
        if read is not None:
            made = _made(run, inner, call, kept.index)
            run.silent = "key_value"  # what the block's own projections give is not wanted
            return Port(call.cache, layer.update(*made)), visible, layer
    elif layer.is_initialized:
        layer.seen += seen  # none with a key in this block
    else:  # nothing is kept in any row: the layer learns its shape, and how much was seen
        keys, values = _made(run, inner, call, run.forward.new.slots[:, :1] - run.forward.past)
        layer.expected = own, seen
        layer.update(keys[:, :, :0], values[:, :, :0])
    return call.cache, visible, layer


def keeping(run: BlockRun, inner, call: Call, kept: Kept, layer: RoutedLayer | None) -> Storing:
    """All tokens give keys and values, in order."""
    layer = RoutedLayer(True) if layer is None else layer  # without a cache it lives for this call alone
    new = run.forward.new
    visible = layer.tokens.followed_by(new) if layer.is_initialized else new
    layer.expected = new, kept.keep.shape[1]
    if run.plan.site.key_value or not kept.width:
        made = _made(run, inner, call, None)
        run.silent = "key_value"  # what the kept tokens' own projections give is not wanted
        return Port(call.cache, layer.update(*made)), visible, layer
    # fused with the queries: the kept tokens' come again as the block runs, so that the others' alone are made first
    first = None if kept.whole else _made(run, inner, call, kept.rest.index if kept.even else None)

    def store(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if first is not None:
            keys, values = (_joined(kept, own, others) for own, others in zip((keys, values), first))
        return layer.update(keys, values)

    port = JoiningPort(call.cache)
    port.store = store
    return port, visible, layer


def _made(run: BlockRun, inner, call: Call, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values (B, G, n, D) of the tokens `index` (B, n), or of all: `inner` is run up to its cache."""
    port, full = Port(call.cache), run.attached.full_queries
    run.silent = "query"
    try:
        inner(**call.at(index, port))
    except Deposited:
        assert port.stored is not None
        return port.stored
    except RuntimeError as error:
        if run.plan.index in full or isinstance(error, torch.OutOfMemoryError):
            raise
        full.add(run.plan.index)  # a norm over all heads (OLMo-2), or a view by their number (OPT)
        return _made(run, inner, call, index)
    finally:
        run.silent = ""
    raise UserError(f"block {run.plan.index} gave its cache no keys and values: this model cannot be pruned this way.")


def _joined(kept: Kept, own: Tensor, others: Tensor) -> Tensor:
    """Keys (or values) (B, G, T, D) of all tokens in order: `own` (B, G, K, D) where tokens are kept, `others`
    elsewhere. A token's heads stay side by side in memory, as the projections leave them."""
    own, others = own.transpose(1, 2), others.transpose(1, 2)
    if kept.even:
        merged = kept.join(own, others)
    else:
        merged = kept.put(others.flatten(2), own.flatten(2)).view_as(others)
    return merged.transpose(1, 2)
