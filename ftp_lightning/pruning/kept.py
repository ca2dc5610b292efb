"""Which tokens a tensor of hidden states, queries or keys holds, and moving kept tokens out of a text, or out of the
arguments of a block, and back.

Shapes: B rows, T tokens of a row (padding included), K kept tokens of the fullest row, Q queries, S keys.
A *slot* is a token's place among all tokens seen, padding included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftp_lightning.errors import UserError

if TYPE_CHECKING:
    from ftp_lightning.pruning.calls import Signature


@dataclass(frozen=True)
class Tokens:
    """Slots (B, n) int64, ascending in every row but for fillers; valid (B, n) bool; `all_valid` spares masks."""

    slots: Tensor
    valid: Tensor
    all_valid: bool

    def followed_by(self, other: Tokens) -> Tokens:
        slots, valid = torch.cat([self.slots, other.slots], 1), torch.cat([self.valid, other.valid], 1)
        return Tokens(slots, valid, self.all_valid and other.all_valid)

    def first(self, n: int) -> Tokens:
        return Tokens(self.slots[:, :n], self.valid[:, :n], self.all_valid)

    def last(self, n: int) -> Tokens:
        return Tokens(self.slots[:, -n:], self.valid[:, -n:], self.all_valid)


def visible_keys(query_slots: Tensor, keys: Tokens, window: int | None) -> Tensor:
    """(B, Q, S) bool: key j is no later than query i, valid, and within the block's sliding window."""
    visible = keys.slots[:, None, :] <= query_slots[:, :, None]
    if not keys.all_valid:
        visible = visible & keys.valid[:, None, :]
    if window is not None:
        visible = visible & (keys.slots[:, None, :] > query_slots[:, :, None] - window)
    return visible


def padding_arguments(mask: Tensor | None, start: int = 0, end: int | None = None) -> dict[str, Tensor]:
    """What a forward over the tokens [start, end) of padded rows is told: which tokens so far are real, and positions
    that count real tokens alone. Nothing without a mask (B, T), 1 = real."""
    if mask is None:
        return {}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}


class Kept:
    """The kept tokens of a (B, T) decision, gathered: row b's in ascending order at the end, fillers before them.

    Fillers come first so that the k-th entry from the end has at least k later entries above it: that bounds the keys a
    chunk of queries may see without asking the device (`attention`).

    Attributes:
        keep: (B, T) bool.
        counts: kept tokens of each row, on the host.
        width: K, the largest of them.
        even: all rows keep K, so there are no fillers.
        whole: every token is kept.
    """

    def __init__(self, keep: Tensor, counts: Sequence[int]):
        self.keep, self.counts = keep, tuple(counts)
        self.width = max(self.counts)
        self.even = min(self.counts) == self.width
        self.whole = self.even and self.width == keep.shape[1]

    @cached_property
    def index(self) -> Tensor:
        """(B, K) int64, places in the row."""
        rows, tokens = self.keep.shape
        if self.even and self.keep.device.type == "cpu" and not torch.compiler.is_compiling():
            # elsewhere this would wait for the device
            return self.keep.nonzero()[:, 1].view(rows, self.width)
        if self.even:  # without a sort: each kept token goes to the place that it has among the kept ones
            place = torch.where(self.keep, self.keep.cumsum(1) - 1, self.width)
            order = torch.arange(tokens, device=place.device).expand(rows, tokens)
            return order.new_zeros(rows, self.width + 1).scatter(1, place, order)[:, : self.width]
        order = self.keep.to(torch.uint8).sort(dim=1, stable=True).indices
        return order[:, tokens - self.width :]

    @cached_property
    def valid(self) -> Tensor:
        """(B, K) bool, False for fillers."""
        if self.even:
            return self.keep.new_ones(()).expand(self.index.shape)
        return self.keep.gather(1, self.index)

    @cached_property
    def rest(self) -> Kept:
        """The tokens that are not kept; only where rows are even."""
        tokens = self.keep.shape[1]
        return Kept(~self.keep, [tokens - count for count in self.counts])

    def take(self, x: Tensor) -> Tensor:
        """x (B or 1, T, ...) -> (B, K, ...)."""
        return take_tokens(x, self.index)

    def join(self, kept: Tensor, others: Tensor) -> Tensor:
        """(B, T, ...) of kept (B, K, ...) and those of `rest`, others (B, T - K, ...); only where rows are even."""
        whole = kept.new_empty(*self.keep.shape, *kept.shape[2:])
        _put_(whole, self.index, kept)
        _put_(whole, self.rest.index, others)
        return whole

    def put(self, base: Tensor, kept: Tensor) -> Tensor:
        """A copy of base (B, T, D) with the kept tokens (B, K, D) in their places; what fillers hold is dropped.

        Under autocast the two may differ in dtype: the copy has that of `base`.
        """
        kept = kept.to(base.dtype)
        if not self.even:
            kept = torch.where(self.valid[..., None], kept, take_tokens(base, self.index))
        if len(base) == 1:
            return base.index_copy(1, self.index[0], kept)
        return base.scatter(1, self.index[..., None].expand_as(kept), kept)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x (B or 1, T, ...) at the tokens index (B, K) -> (B, K, ...)."""
    if index.shape[0] == 1:
        return x.index_select(1, index[0])
    tail = x.shape[2:]
    expanded = index.view(*index.shape, *[1] * len(tail)).expand(*index.shape, *tail)
    return x.expand(index.shape[0], *x.shape[1:]).gather(1, expanded)


def _put_(target: Tensor, index: Tensor, source: Tensor) -> None:
    """target (B, T, ...) gets the tokens source (B, n, ...) at index (B, n), in place."""
    source = source.to(target.dtype)
    if len(target) == 1:
        target.index_copy_(1, index[0], source)
    else:
        target.scatter_(1, index.view(*index.shape, *[1] * (source.dim() - 2)).expand_as(source), source)


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block or an attention, by name, whichever way they came.

    Attributes:
        arguments: by name. cache_name: the name of the cache among them.
        hidden: (B, T, D), what comes in. cache: the key-value cache; None without one.
    """

    arguments: dict
    cache_name: str
    hidden: Tensor
    cache: Any

    @staticmethod
    def of(signature: Signature, args: tuple, kwargs: dict) -> Call:
        named = signature.bind(*args, **kwargs).arguments
        named |= named.pop(signature.extra_name, {})
        cache_name = signature.cache_name
        return Call(named, cache_name, named["hidden_states"], named.get(cache_name))

    def at(self, index: Tensor | None, cache: object) -> dict:
        """The arguments for the tokens `index` (B, K) alone, or for all, with another cache and without a mask."""
        changes = {"attention_mask": None, self.cache_name: cache}
        if index is None:
            return self.arguments | changes
        changes["hidden_states"] = take_tokens(self.hidden, index)
        embeddings = self.arguments.get("position_embeddings")
        if isinstance(embeddings, Tensor):
            changes["position_embeddings"] = take_tokens(embeddings, index)
        elif embeddings is not None:
            changes["position_embeddings"] = tuple(map(partial(take_tokens, index=index), embeddings))
        positions = self.arguments.get("position_ids")
        if positions is not None:
            if positions.dim() != 2:
                raise UserError("position_ids of shape (batch, tokens) are understood; this model has others.")
            changes["position_ids"] = take_tokens(positions, index)
        return self.arguments | changes


def tensor_of(output) -> Tensor:
    """A block's output; UserError where it is none that is understood."""
    if not isinstance(output, Tensor):
        raise UserError(f"a block returned {type(output).__name__}, not a tensor: this model cannot be pruned.")
    return output
