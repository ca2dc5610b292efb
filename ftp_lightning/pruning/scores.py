"""The attention every token receives, without ever making a T x T matrix, and the table that routers read it from.

"Block l's router reads what the last block in which the token took part wrote" (paper): for a prompt the table flows
through the blocks. With `AttentionScore(blocks="max")` a router reads the greatest of what the blocks before it wrote,
in place of the latest. `continuation_scores` has the table of continuation tokens.

Shapes: B rows, P routed tokens, H query heads, G = key heads, Q queries, S keys, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.attention_score import AttentionScore, Span, check_ends, spans_of_rows
from ftp_lightning.pruning.kept import Kept, Tokens, visible_keys
from ftp_lightning.pruning.score_log import remember_prompt

if TYPE_CHECKING:
    from ftp_lightning.pruning.block_run import BlockRun
    from ftp_lightning.pruning.cache import RoutedLayer

SCORE_CHUNK = 128
"""Queries whose probabilities are held at once [ours]: B x H x 128 x S numbers."""
KEY_CHUNK = 1024
"""Keys of another dtype than float32 that are cast at once [ours]: B x G x 1024 x D numbers."""


@dataclass
class Tapped:
    """What the attention of one block was computed from: query (B, H, Q, D), key (B, G, S, D), after the rotary
    embedding."""

    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None
    window: int | None


@torch.no_grad()
def write_scores(run: BlockRun, kept: Kept | None, queries: Tokens, keys: Tokens, layer: RoutedLayer | None) -> None:
    """Write what the attention that just ran (`run.tapped`) says of its keys into the table that later routers read.

    kept: where the queries stand among the new tokens; None = they are all of them.
    """
    tapped, run.tapped = run.tapped, None
    forward, score = run.forward, run.attached.pruner.attention_score
    table, routed = forward.table, forward.routed
    assert tapped is not None and table is not None
    # under autocast products would be bfloat16, and move a score by several percent
    with torch.autocast(tapped.key.device.type, enabled=False):
        if not isinstance(table, PromptTable):
            table.hear(run, tapped, kept, queries, keys, layer)
            return
        assert routed is not None
        width = routed.real.shape[1]
        if forward.training is not None:  # tokens after the routed ones have no say in how these are routed
            tapped.query, tapped.key = tapped.query[:, :, :width], tapped.key[:, :, :width]
            queries, keys = queries.first(width), keys.first(width)
        index = None if kept is None or run.plan.keeps else kept.index
        new = width if index is None else index.shape[1]
        if (reads := run.attached.plan.needs.reads) is not None:
            scores, seen = reads(tapped, queries, keys, forward.span)
        else:
            if table.asking is not None:
                asking = table.asking if kept is None else table.asking.gather(1, kept.index)
                queries = Tokens(queries.slots, queries.valid & asking, False)
            before = keys.slots.shape[1] - new
            scores, seen = received_attention(tapped, queries, keys, table.last, before, score.heads)
            if score.pooling != "none":
                row = forward.seen if forward.past else forward.new
                scores = pooled_scores(scores, seen, keys, row, score.pooling, score.kernel_size)
        if layer is not None and run.attached.pruner.decode != "dense":
            remember_prompt(layer, scores, seen, keys, forward.span)
        table.write(scores[:, -new:], seen[:, -new:], index)


@dataclass
class PromptTable:
    """The scores of the routed tokens.

    Attributes:
        own: (B, P); 1 before any is known. adds_up: sums of what was written, 0 before.
        known: (B, P) bool, where the greatest score of all blocks counts: those that have one.
        asking: (B, P) bool, the tokens whose queries are averaged over; None: all. last: at most so many of them, the
            last ones; None: all.
    """

    own: Tensor
    adds_up: bool = False
    known: Tensor | None = None
    asking: Tensor | None = None
    last: int | None = None

    def ask(
        self, score: AttentionScore, real: Tensor, position: Tensor, spans: tuple[Span, ...], lengths: tuple[int, ...]
    ) -> None:
        """Say whose queries count: real, position (B, P) among the row's real tokens; for window="question" spans, and
        lengths of the rows, to check them by."""
        if score.window == "question":
            spans = spans_of_rows(spans, len(real))
            if lengths:
                check_ends(spans, lengths)
            start, end = torch.tensor(spans, device=real.device).unbind(1)
            self.asking = real & (position >= start[:, None]) & (position < end[:, None])
            self.last = max(end - start for start, end in spans)
        else:
            self.last = score.window if isinstance(score.window, int) else None
            if score.window_end:
                self.asking = real.flip(1).cumsum(1).flip(1) > score.window_end
                self.asking &= real

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


def received_attention(
    tapped: Tapped, queries: Tokens, keys: Tokens, last: int | None, before: int = 0, heads: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Attention score of every key [ours, method.md section 4]:

        a_j = mean over heads h, and over those queries i in Q that may see j, of n_i * P_hij

    with n_i the number of keys visible to query i (uniform attention gives 1 in every mode), and Q the row's last
    `min(last, valid)` valid queries (`window`), or all of them (`last=None`, `exact`, in chunks of 128 queries).
    `before`: keys that are earlier than every query. heads "max": the greatest score of all heads, in place of the
    mean. Under autocast it has to be switched off around the call.

    Returns: scores (B, S) float32, seen (B, S) bool: False where no query of Q sees the key; its score is then
    meaningless.
    """
    batch, stored = keys.slots.shape
    number = tapped.query.shape[1]
    count = tapped.key.new_zeros(batch, stored, dtype=torch.float32)
    by_head = heads == "max"
    total = count.new_zeros(batch, number if by_head else 1, stored)
    for chunk in query_chunks(tapped, queries, keys, last, before):
        probability = probabilities(tapped, chunk)
        if by_head:
            total[..., : chunk.keys] += torch.matmul(chunk.counts[:, None, None], probability).squeeze(2)
        else:
            weight = (chunk.counts / number)[:, None].expand(-1, number, -1).reshape(batch, 1, -1)
            total[..., : chunk.keys] += torch.matmul(weight, probability.flatten(1, 2))
        count[:, : chunk.open] += chunk.queries
        count[:, chunk.open : chunk.keys] += chunk.visible.sum(1)
    return (total.amax(1) if by_head else total[:, 0]) / count.clamp(min=1), count > 0


def pooled_scores(scores: Tensor, seen: Tensor, keys: Tokens, row: Tokens, pooling: str, kernel_size: int) -> Tensor:
    """Scores pooled over the `kernel_size` tokens around each key: "max" or "average" of those that are seen.

    Neighbours are neighbours among the row's real tokens, so that padding changes nothing; a token that is no key here
    has no score.

    Args: scores, seen (..., S) of the keys, with one dimension more than keys.slots or none; row (B, span), all tokens
    seen so far, valid = real. Returns (..., S) float32, meaningless where `seen` is False.
    """
    places = keys.slots
    if not row.all_valid:
        places = (row.valid.to(torch.int64).cumsum(1) - 1).clamp(min=0).gather(1, places)
    places = places.view(len(places), *[1] * (scores.dim() - 2), -1).expand_as(scores).reshape(-1, scores.shape[-1])
    known = torch.where(seen, scores, -torch.inf).reshape(places.shape)
    # a filler may share its place with a key, and is not seen: the larger of the two stands
    text = known.new_full((len(places), 1, row.slots.shape[1]), -torch.inf)
    text = text.scatter_reduce(2, places[:, None], known[:, None], "amax")
    around = {"kernel_size": kernel_size, "stride": 1, "padding": kernel_size // 2}
    if pooling == "max":
        text = torch.nn.functional.max_pool1d(text, **around)
    else:
        counts = text > -torch.inf
        total, share = (
            torch.nn.functional.avg_pool1d(x, **around) for x in (torch.where(counts, text, 0.0), counts.float())
        )
        text = total / share.clamp(min=0.5 / kernel_size)
    return text[:, 0].gather(1, places).view_as(scores)


@dataclass
class Chunk:
    """Some queries and the keys they may see: `keys` of them come into question, the first `open` are seen by all.

    index: the queries, a slice where rows are alike, else (B, q). visible (B, q, keys - open) bool. counts (B, q)
    float32: n_i. certain: every query sees a key.
    """

    index: Tensor | slice
    queries: int
    keys: int
    open: int
    visible: Tensor
    counts: Tensor
    certain: bool


def query_chunks(tapped: Tapped, queries: Tokens, keys: Tokens, last: int | None, before: int):
    """The queries that count, SCORE_CHUNK at a time.

    Where all are valid, the chunk up to query `stop` sees none of the last Q - stop keys, and where keys are valid and
    no window ends, all keys before its own first query: at least `before` + start. On a CPU the slots themselves are at
    hand.
    """
    batch, n = queries.slots.shape
    stored, wanted = keys.slots.shape[1], n if last is None else min(last, n)
    if queries.all_valid:
        bounded = tapped.window is not None or not keys.all_valid
        on_host = keys.slots.device.type == "cpu" and not torch.compiler.is_compiling()
        for start in range(n - wanted, n, SCORE_CHUNK):
            stop = min(start + SCORE_CHUNK, n)
            low, high = before + start, stored - n + stop
            if bounded:
                low = 0
            elif on_host and keys is not queries:
                low = int((keys.slots <= queries.slots[:, start : start + 1]).sum(1).min())
            rest = Tokens(keys.slots[:, low:high], keys.valid[:, low:high], keys.all_valid)
            visible = visible_keys(queries.slots[:, start:stop], rest, tapped.window)
            counts = visible.sum(-1, dtype=torch.float32) + low
            yield Chunk(slice(start, stop), stop - start, high, low, visible, counts, True)
        return
    rank = torch.where(queries.valid, queries.slots, -1)
    places = rank.topk(wanted, dim=1).indices.sort(dim=1).values
    for index in places.split(SCORE_CHUNK, dim=1):
        usable = queries.valid.gather(1, index)
        visible = visible_keys(queries.slots.gather(1, index), keys, tapped.window) & usable[..., None]
        yield Chunk(index, index.shape[1], stored, 0, visible, visible.sum(-1, dtype=torch.float32), False)


def probabilities(tapped: Tapped, chunk: Chunk) -> Tensor:
    """Softmax rows (B, H, q, keys) float32 of the chunk's queries; zeros where a query may see nothing."""
    batch, heads, _, size = tapped.query.shape
    key = tapped.key[:, :, : chunk.keys]
    if isinstance(chunk.index, slice):
        q = tapped.query[:, :, chunk.index]
    else:
        q = tapped.query.gather(2, chunk.index[:, None, :, None].expand(batch, heads, -1, size))
    q = q.reshape(batch, key.shape[1], -1, size)  # the heads of one key head side by side
    # in float32 from the start: the product may not fit float16, and ranks must not depend on the model's dtype
    q = q.float() * tapped.scaling
    logits = q @ key.transpose(2, 3) if key.dtype == torch.float32 else products(q, key)
    if tapped.softcap is not None:
        logits = tapped.softcap * torch.tanh(logits / tapped.softcap)
    logits = logits.view(batch, heads, chunk.queries, -1)
    logits[..., chunk.open :].masked_fill_(~chunk.visible[:, None], -torch.inf)
    probability = logits.softmax(-1)
    return probability if chunk.certain else probability.nan_to_num_(0.0)


def products(query: Tensor, key: Tensor) -> Tensor:
    """q k_j: (B, G, q, S) float32 of query (B, G, q, D) float32 and key (B, G, S, D) of any dtype, without a float32
    copy of all keys."""
    if key.shape[2] <= KEY_CHUNK:
        return torch.matmul(query, key.float().transpose(2, 3))
    products = query.new_empty(*query.shape[:3], key.shape[2])
    for start in range(0, key.shape[2], KEY_CHUNK):
        some = key[:, :, start : start + KEY_CHUNK].float()
        products[..., start : start + KEY_CHUNK] = torch.matmul(query, some.transpose(2, 3))
    return products
