"""A layer of a Hugging Face cache that holds the keys and values of the tokens a routed block computed.

Shapes: B rows, G key heads, S stored entries, D head size, `seen` slots.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.kept import Tokens
from ftp_lightning.pruning.score_log import ScoreLog


class RoutedLayer(DynamicLayer):
    """Stored entries have a slot (their place among all tokens seen, padding included) and a validity.

    `get_seq_length` and `get_mask_sizes` speak for all tokens *seen*: Hugging Face sizes position ids and masks by
    them. Under `evict` fewer entries are stored than seen; under `keep` all are, in order (`complete`). With a sliding
    `window` entries that no later query can see are dropped, as the stock layer does.

    The layer takes new keys and values only while a block run has announced which tokens they belong to (`expect`); a
    model without its pruner is refused.

    What routing of continuation tokens needs lives here too, by slot, so that beams reorder it and `crop` rolls it
    back: `scores`, the attention score that this block wrote last for every token (see `table`), and those before; and
    by part of the block `account` (B, seen) uint8 (see `policies`). Neither is there until a decode policy asks.
    """

    is_initialized: bool
    keys: Tensor
    values: Tensor

    def __init__(self, complete: bool, window: int | None = None):
        super().__init__()
        self.complete, self.window = complete, window
        self.is_sliding = window is not None
        self.record_past = False
        self._forget()

    def _forget(self) -> None:
        self.seen = 0
        self.all_valid = True
        self._slots: list[Tensor] = []
        self._valid: list[Tensor] = []
        self._announced: tuple[Tokens, int] | None = None
        self.scores = ScoreLog()
        self.account: dict[str, Tensor] = {}

    @property
    def tokens(self) -> Tokens:
        """Which tokens are stored: slots and valid (B, S); only after the first `append`."""
        if len(self._slots) > 1:  # put together when they are asked for: a plain decode step never does
            self._slots, self._valid = [torch.cat(self._slots, 1)], [torch.cat(self._valid, 1)]
        return Tokens(self._slots[0], self._valid[0], self.all_valid)

    def expect(self, tokens: Tokens, seen: int) -> None:
        """Announce the next `update`: its keys are those of `tokens` (B, n), and `seen` tokens have been seen with
        it."""
        self._announced = tokens, seen

    def forget_announced(self) -> None:
        """The announced keys do not come: an error stopped the block."""
        self._announced = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self._announced is None:
            raise UserError(
                "this cache was filled by a TokenPruner and holds only the tokens each block computed.\n"
                "Use it while the pruner is attached, or start with a new cache."
            )
        (tokens, seen), self._announced = self._announced, None
        return self.append(key_states, value_states, tokens, seen)

    def append(self, keys: Tensor, values: Tensor, tokens: Tokens, seen: int) -> tuple[Tensor, Tensor]:
        """Add the entries keys, values (B, G, n, D) of `tokens` (B, n); returns all that their queries may see."""
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
            routed.append(layer.keys, layer.values, Tokens(slots, valid, real is None), seen)
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
        self.keys = self.values = None  # as stock layers before their first key
        self.is_initialized, self.complete = False, True
        self._forget()

    def _map_rows(self, change) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = change(self.keys), change(self.values)
        if self._slots:
            tokens = self.tokens  # put together: else every step would move the pieces of all steps before
            self._slots, self._valid = [change(tokens.slots)], [change(tokens.valid)]
        self.scores.map(change)
        self.account = {part: change(account) for part, account in self.account.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda t: t[indices.to(t.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last |n| tokens seen (n <= 0, as Hugging Face calls it)."""
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


class Deposited(Exception):
    """Raised by a `DepositPort` once keys and values are in hand: the rest of the block is not wanted."""


class Port:
    """Stands in for the cache during one call of a block: takes the new keys and values, gives all that the queries may
    see."""

    def __init__(self, cache, finish):
        self._cache, self._finish = cache, finish

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return self._finish(keys, values)

    def __getattr__(self, name):
        if name.startswith("__") or self._cache is None:
            raise AttributeError(f"the model asks the cache for `{name}`, but this forward has no cache")
        return getattr(self._cache, name)


class DepositPort(Port):
    """Catches the keys and values of skipped tokens (`kv="keep"`) and stops the block there."""

    def __init__(self, cache):
        super().__init__(cache, None)
        self.keys = self.values = None

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs):
        self.keys, self.values = keys, values
        raise Deposited
