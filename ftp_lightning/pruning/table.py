"""The table of latest attention scores: what the router of block l reads of the blocks before it.

"Block l's router reads what the last block in which the token took part wrote" (paper). For a prompt the table flows
through the blocks. A continuation token reads, for every token up to itself, what the last block *before l* in which
that token was a key wrote last, by any query up to itself [ours]: block by block, so that a chunk of continuation
tokens scored at once reads the very numbers that the same tokens read one by one. What a block wrote last is kept with
its layer of the cache (`RoutedLayer.scores`), by slot.

With `AttentionScore(blocks="max")` a router reads the greatest of what the blocks before it wrote last, in place of the
latest.

Shapes: B rows, T new tokens, S slots seen after this forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ftp_lightning.attention_score import AttentionScore, Span
from ftp_lightning.pruning.cache import RoutedLayer
from ftp_lightning.pruning.kept import Tokens
from ftp_lightning.routing.factors import average_rank

UNWRITTEN = -1.0
"""No score yet; scores are never negative."""


class PromptTable:
    """Scores (B, P) of the routed tokens; 1 before any is known. adds_up: sums of what was written, 0 before.

    asking (B, P) bool: the tokens whose queries are averaged over, None = all; `last`: at most so many of them, the
    last ones, None = all.
    """

    def __init__(self, batch: int, tokens: int, device: torch.device, adds_up: bool = False, greatest: bool = False):
        self.adds_up = adds_up
        self.own = torch.full((batch, tokens), 0.0 if adds_up else 1.0, device=device)
        self.known = torch.zeros(batch, tokens, dtype=torch.bool, device=device) if greatest else None
        self.rank = None  # among the routed tokens: left to the router's factor
        self.asking: Tensor | None = None
        self.last: int | None = None

    def ask(self, score: AttentionScore, real: Tensor, position: Tensor, spans: tuple[Span, ...]) -> None:
        """Say whose queries count: real, position (B, P) among the row's real tokens; spans: one per row, for
        window="question"."""
        if score.window == "question":
            start, end = torch.tensor(spans, device=real.device).unbind(1)
            self.asking = real & (position >= start[:, None]) & (position < end[:, None])
            self.last = max(end - start for start, end in spans)
        else:
            self.last = score.window if isinstance(score.window, int) else None
            if score.window_end:
                self.asking = real.flip(1).cumsum(1).flip(1) > score.window_end
                self.asking &= real

    def asked(self, queries: Tokens, index: Tensor | None) -> Tokens:
        """The queries that count among these, of the tokens at index (B, n) or of all in order."""
        if self.asking is None:
            return queries
        asking = self.asking if index is None else self.asking.gather(1, index)
        return Tokens(queries.slots, queries.valid & asking, False)

    def go_to(self, place: torch.device) -> None:
        self.own = self.own.to(place)
        self.known = None if self.known is None else self.known.to(place)
        self.asking = None if self.asking is None else self.asking.to(place)

    def write(self, scores: Tensor, seen: Tensor, index: Tensor | None) -> None:
        """Scores (B, n) of the tokens at index (B, n), or of all in order; where none was `seen` the old value
        stays."""
        before = self.own if index is None else self.own.gather(1, index)
        if self.known is not None:
            known = self.known if index is None else self.known.gather(1, index)
            scores = torch.where(known, torch.maximum(before, scores), scores)
            self.known = known | seen if index is None else self.known.scatter(1, index, known | seen)
        after = torch.where(seen, before + scores if self.adds_up else scores, before)
        self.own = after if index is None else self.own.scatter(1, index, after)


class ContinuationTable:
    """Scores (B, T, S): those that each of T continuation tokens reads of all slots; 1 before any is known."""

    def __init__(self, real: Tensor, past_real: Tensor | None, past: int, greatest: bool = False):
        batch, new = real.shape
        self.past, self.span = past, past + new
        before = real.new_ones(batch, past) if past_real is None else past_real
        everyone = torch.cat([before, real], 1)
        slots = torch.arange(self.span, device=real.device)
        self.counts = everyone[:, None] & (slots <= slots[past:, None])  # (B, T, S): the real tokens up to each one
        self.values = torch.ones(batch, new, self.span, device=real.device)
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

    def write(self, layer: RoutedLayer, scores: Tensor, seen: Tensor, keys: Tokens) -> None:
        """Take in what each query said of its keys: scores, seen (B, T, K) of the keys' slots; rows of tokens that were
        not computed have seen nothing."""
        said = torch.full_like(self.values, UNWRITTEN)
        slots = keys.slots[:, None].expand_as(scores)
        # a filler may share its slot with a real key, and says nothing: the larger of the two stands
        said = said.scatter_reduce(2, slots, torch.where(seen, scores, UNWRITTEN), "amax")
        before = _stored(layer, self.values[:, 0])
        latest = _forward_fill(torch.cat([before[:, None], said], 1))
        layer.scores.add(self.past + 1, latest[:, 1:])
        self._take_in(latest[:, 1:])

    def recall(self, layer: RoutedLayer) -> None:
        """Take in what the block wrote before, where none of the new tokens is computed there."""
        before = _stored(layer, self.values[:, 0])[:, None].expand_as(self.values)
        layer.scores.add(self.past + 1, before)
        self._take_in(before)

    def _take_in(self, said: Tensor) -> None:
        """What a block says (B, T, S), UNWRITTEN where it says nothing."""
        fresh = said >= 0
        if self.known is not None:
            said = torch.where(self.known, torch.maximum(self.values, said), said)
            self.known = self.known | fresh
        self.values = torch.where(fresh, said, self.values)


def remember_prompt(layer: RoutedLayer, scores: Tensor, seen: Tensor, keys: Tokens, span: int) -> None:
    """Keep with the layer what a prompt's block wrote: scores, seen (B, K) of the keys' slots; `span` slots seen."""
    fresh = scores.new_full((scores.shape[0], span), UNWRITTEN)
    fresh = fresh.scatter_reduce(1, keys.slots, torch.where(seen, scores, UNWRITTEN), "amax")
    layer.scores.add(span, torch.where(fresh >= 0, fresh, _stored(layer, fresh))[:, None], prompt=True)


def _stored(layer: RoutedLayer, like: Tensor) -> Tensor:
    """What the layer wrote last, brought to the shape (B, S) of `like`."""
    known = layer.scores.latest
    known = like[:, :0] if known is None else known
    return torch.cat([known, like.new_full((len(like), like.shape[1] - known.shape[1]), UNWRITTEN)], 1)


def _forward_fill(x: Tensor) -> Tensor:
    """x (B, T, S) with every UNWRITTEN replaced by the latest score above it in T, where there is one."""
    steps = torch.arange(x.shape[1], device=x.device)[None, :, None]
    latest = torch.where(x >= 0, steps, 0).cummax(dim=1).values
    return x.gather(1, latest)
