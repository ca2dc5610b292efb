"""A layer of a Hugging Face cache that holds the keys and values of the tokens a routed block computed."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.attention import Tokens


class RoutedLayer(DynamicLayer):
    """Stored entries have a slot (their place among all tokens seen, padding included) and a validity.

    `get_seq_length` and `get_mask_sizes` speak for all tokens *seen*: Hugging Face sizes position ids and the causal
    mask by them. Under `evict` fewer entries are stored than seen; under `keep` all are, in order (`complete`).

    The layer is filled through a `Port` by the engine; `update`, which a model without its pruner would call, is
    refused.
    """

    def __init__(self, complete: bool):
        super().__init__()
        self.seen = 0
        self.complete = complete
        self.slots: Tensor | None = None  # (B, S) int64
        self.valid: Tensor | None = None  # (B, S) bool
        self.all_valid = True

    @property
    def tokens(self) -> Tokens:
        """Which tokens are stored; only after the first `append`."""
        return Tokens(self.slots, self.valid, self.all_valid)

    def append(self, keys: Tensor, values: Tensor, tokens: Tokens, seen: int) -> None:
        """Add the entries keys, values (B, G, S', D) of `tokens` (B, S'); `seen` tokens have been seen for them."""
        slots, valid = tokens.slots, tokens.valid
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self.keys, self.values, self.slots, self.valid = keys, values, slots, valid
        else:
            self.keys, self.values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
            self.slots, self.valid = torch.cat([self.slots, slots], dim=1), torch.cat([self.valid, valid], dim=1)
        self.all_valid &= tokens.all_valid
        self.seen += seen

    @staticmethod
    def adopt(layer: CacheLayerMixin, complete: bool, real: Tensor | None) -> RoutedLayer:
        """The routed form of a stock layer that is empty or was filled densely; `real` (B, seen) marks padding."""
        if type(layer).__name__.startswith("Static"):
            raise UserError(
                "token skipping needs a dynamic key-value cache; this one is static.\n"
                "Leave `cache_implementation` unset."
            )
        routed = RoutedLayer(complete)
        if layer.is_initialized and layer.get_seq_length():
            batch, _, seen, _ = layer.keys.shape
            if seen != layer.get_seq_length():
                raise UserError("this cache has dropped old tokens (sliding window): a chunk cannot be routed into it.")
            slots = torch.arange(seen, device=layer.keys.device).expand(batch, seen)
            valid = torch.ones_like(slots, dtype=torch.bool) if real is None else real
            routed.append(layer.keys, layer.values, Tokens(slots, valid, real is None), seen)
        return routed

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise UserError(
            "this cache was filled by a TokenPruner and holds only the tokens each block computed.\n"
            "Use it while the pruner is attached, or start with a new cache."
        )

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.seen, self.slots, self.valid, self.all_valid = 0, None, None, True

    def _map_rows(self, change) -> None:
        if self.is_initialized:
            self.keys, self.values, self.slots, self.valid = (
                change(t) for t in (self.keys, self.values, self.slots, self.valid)
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda t: t[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last |n| tokens seen (n <= 0, as Hugging Face calls it)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self.seen += tokens_to_remove
        stay = self.slots < self.seen
        stored = int(stay.sum(1).max())  # slots ascend, so what stays is a prefix of every row
        self.keys, self.values = self.keys[:, :, :stored], self.values[:, :, :stored]
        self.slots, self.valid = self.slots[:, :stored], (self.valid & stay)[:, :stored]
        self.all_valid &= bool(stay[:, :stored].all())


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
        if self._cache is None:
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
