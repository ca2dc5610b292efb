"""The table of latest attention scores as continuation tokens read it, under a decode policy.

A continuation token reads, for every token up to itself, what the last block *before l* in which that token was a key
wrote last, by any query up to itself [ours]: block by block, so that a chunk of continuation tokens scored at once
reads the very numbers that the same tokens read one by one. What a block wrote last is kept with its layer of the cache
(`RoutedLayer.scores`), by slot.

Shapes: B rows, T new tokens, S slots seen after this forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.pruning.kept import Kept, Tokens
from ftp_lightning.pruning.score_log import UNWRITTEN, log_of, stored_scores
from ftp_lightning.pruning.scores import Tapped, pooled_scores, probabilities, query_chunks
from ftp_lightning.routing.learned import average_rank

if TYPE_CHECKING:
    from ftp_lightning.pruning.block_run import BlockRun
    from ftp_lightning.pruning.cache import RoutedLayer


class ContinuationTable:
    """Scores (B, T, S): those that each of T continuation tokens reads of all slots; 1 before any is known."""

    def __init__(self, real: Tensor, past_real: Tensor | None, past: int, greatest: bool = False):
        batch, new = real.shape
        self.past, self.span = past, past + new
        before = real.new_ones(batch, past) if past_real is None else past_real
        everyone = torch.cat([before, real], 1)
        slots = torch.arange(self.span, device=real.device)
        self.counts = everyone[:, None] & (slots <= slots[past:, None])  # (B, T, S): the real tokens up to each one
        self.values = torch.ones(batch, new, self.span, dtype=torch.float32, device=real.device)
        self.known = torch.zeros_like(self.values, dtype=torch.bool) if greatest else None

    def go_to(self, place: torch.device) -> None:
        self.values, self.counts = self.values.to(place), self.counts.to(place)
        self.known = None if self.known is None else self.known.to(place)

    @property
    def own(self) -> Tensor:
        """(B, T): each token's own score."""
        return self.values[:, :, self.past :].diagonal(dim1=1, dim2=2)

    @property
    def rank(self) -> Tensor:
        """(B, T): rank of each token's own score among the real tokens up to itself, over n - 1; in [0, 1]."""
        flat, real = self.values.flatten(0, 1), self.counts.flatten(0, 1)
        rank = average_rank(flat, real).view_as(self.values)[:, :, self.past :].diagonal(dim1=1, dim2=2)
        return rank / (self.counts.sum(-1) - 1).clamp(min=1)

    def hear(
        self, run: BlockRun, tapped: Tapped, kept: Kept | None, queries: Tokens, keys: Tokens, layer: RoutedLayer | None
    ) -> None:
        """What `write_scores` does for a continuation."""
        assert layer is not None  # a continuation has a cache
        score = run.attached.pruner.attention_score
        scores, seen = received_by_query(tapped, queries, keys, score.heads)
        seen = seen & queries.valid[..., None]
        if score.pooling != "none":
            scores = pooled_scores(scores, seen, keys, run.forward.seen, score.pooling, score.kernel_size)
        if kept is not None and not kept.whole:
            tokens = kept.keep.shape[1]
            scores = kept.put(scores.new_zeros(len(scores), tokens, scores.shape[2]), scores)
            seen = kept.put(seen.new_zeros(len(seen), tokens, seen.shape[2]), seen)
        self.write(layer, scores, seen, keys)

    def write(self, layer: RoutedLayer, scores: Tensor, seen: Tensor, keys: Tokens) -> None:
        """Take in what each query said of its keys: scores, seen (B, T, K) of the keys' slots; rows of tokens that were
        not computed have seen nothing."""
        said = torch.full_like(self.values, UNWRITTEN)
        slots = keys.slots[:, None].expand_as(scores)
        # a filler may share its slot with a real key, and says nothing: the larger of the two stands
        said = said.scatter_reduce(2, slots, torch.where(seen, scores, UNWRITTEN), "amax")
        before = stored_scores(layer, self.values[:, 0])
        latest = _forward_fill(torch.cat([before[:, None], said], 1))
        log_of(layer).add(self.past + 1, latest[:, 1:])
        self._take_in(latest[:, 1:])

    def recall(self, layer: RoutedLayer) -> None:
        """Take in what the block wrote before, where none of the new tokens is computed there."""
        before = stored_scores(layer, self.values[:, 0])[:, None].expand_as(self.values)
        log_of(layer).add(self.past + 1, before)
        self._take_in(before)

    def _take_in(self, said: Tensor) -> None:
        """What a block says (B, T, S), UNWRITTEN where it says nothing."""
        fresh = said >= 0
        if self.known is not None:
            said = torch.where(self.known, torch.maximum(self.values, said), said)
            self.known = self.known | fresh
        self.values = torch.where(fresh, said, self.values)


def received_by_query(tapped: Tapped, queries: Tokens, keys: Tokens, heads: str = "mean") -> tuple[Tensor, Tensor]:
    """n_i * P_ij, averaged over heads or of the greatest (heads "max"), of every query: what each one alone says of its
    keys. (B, Q, S) float32 and bool (visible)."""
    scores, seen = [], []
    for chunk in query_chunks(tapped, queries, keys, None, 0):
        probability = probabilities(tapped, chunk)
        said = (probability.amax(1) if heads == "max" else probability.mean(1)) * chunk.counts[..., None]
        more = keys.slots.shape[1] - chunk.keys  # later than every query of the chunk
        scores.append(torch.nn.functional.pad(said, (0, more)))
        visible = torch.nn.functional.pad(chunk.visible, (chunk.open, 0), value=True)
        seen.append(torch.nn.functional.pad(visible, (0, more)))
    return torch.cat(scores, 1), torch.cat(seen, 1)


def _forward_fill(x: Tensor) -> Tensor:
    """x (B, T, S) with every UNWRITTEN replaced by the latest score above it in T, where there is one."""
    steps = torch.arange(x.shape[1], device=x.device)[None, :, None]
    latest = torch.where(x >= 0, steps, 0).cummax(dim=1).values
    return x.gather(1, latest)
