"""The attention every token receives, without ever making a T x T matrix.

Shapes: B rows, H query heads, G = key heads, Q queries, S keys, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ftp_lightning.pruning.kept import Tokens, visible_keys

SCORE_CHUNK = 128
"""Queries whose probabilities are held at once [ours]: B x H x 128 x S numbers."""
KEY_CHUNK = 1024
"""Keys of another dtype than float32 that are cast at once [ours]: B x G x 1024 x D numbers."""

P = ParamSpec("P")
R = TypeVar("R")


def in_float32(score: Callable[P, R]) -> Callable[P, R]:
    """`score` with torch.autocast switched off: its products would be bfloat16, and move a score by several percent."""

    @functools.wraps(score)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        tapped = args[0]
        assert isinstance(tapped, Tapped)
        with torch.autocast(tapped.key.device.type, enabled=False):
            return score(*args, **kwargs)

    return run


@dataclass
class Tapped:
    """What the attention of one block was computed from: query (B, H, Q, D), key (B, G, S, D), after the rotary
    embedding."""

    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None
    window: int | None


def scaling_of(query: Tensor, kwargs: dict) -> float:
    """What a model's attention multiplies q k by: what it says, else 1 / sqrt(head size)."""
    scaling = kwargs.get("scaling")
    return query.shape[-1] ** -0.5 if scaling is None else scaling


@in_float32
def received_attention(
    tapped: Tapped, queries: Tokens, keys: Tokens, last: int | None, before: int = 0, heads: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Attention score of every key [ours, method.md section 4]:

        a_j = mean over heads h, and over those queries i in Q that may see j, of n_i * P_hij

    with n_i the number of keys visible to query i (uniform attention gives 1 in every mode), and Q the row's last
    `min(last, valid)` valid queries (`window`), or all of them (`last=None`, `exact`, in chunks of 128 queries).
    `before`: keys that are earlier than every query. heads "max": the greatest score of all heads, in place of the
    mean.

    Returns: scores (B, S) float32, seen (B, S) bool: False where no query of Q sees the key; its score is then
    meaningless.
    """
    batch, stored = keys.slots.shape
    number = tapped.query.shape[1]
    count = tapped.key.new_zeros(batch, stored, dtype=torch.float32)
    by_head = heads == "max"
    total = count.new_zeros(batch, number if by_head else 1, stored)
    for chunk in _query_chunks(tapped, queries, keys, last, before):
        probability = _probabilities(tapped, chunk)
        if by_head:
            total[..., : chunk.keys] += torch.matmul(chunk.counts[:, None, None], probability).squeeze(2)
        else:
            weight = (chunk.counts / number)[:, None].expand(-1, number, -1).reshape(batch, 1, -1)
            total[..., : chunk.keys] += torch.matmul(weight, probability.flatten(1, 2))
        count[:, : chunk.open] += chunk.queries
        count[:, chunk.open : chunk.keys] += chunk.visible.sum(1)
    return (total.amax(1) if by_head else total[:, 0]) / count.clamp(min=1), count > 0


@in_float32
def received_by_query(tapped: Tapped, queries: Tokens, keys: Tokens, heads: str = "mean") -> tuple[Tensor, Tensor]:
    """n_i * P_ij, averaged over heads or of the greatest (heads "max"), of every query: what each one alone says of its
    keys. (B, Q, S) float32 and bool (visible)."""
    scores, seen = [], []
    for chunk in _query_chunks(tapped, queries, keys, None, 0):
        probability = _probabilities(tapped, chunk)
        said = (probability.amax(1) if heads == "max" else probability.mean(1)) * chunk.counts[..., None]
        more = keys.slots.shape[1] - chunk.keys  # later than every query of the chunk
        scores.append(torch.nn.functional.pad(said, (0, more)))
        visible = torch.nn.functional.pad(chunk.visible, (chunk.open, 0), value=True)
        seen.append(torch.nn.functional.pad(visible, (0, more)))
    return torch.cat(scores, 1), torch.cat(seen, 1)


def pooled_scores(scores: Tensor, seen: Tensor, keys: Tokens, row: Tokens, pooling: str, kernel_size: int) -> Tensor:
    """Scores pooled over the `kernel_size` tokens around each key: "max" or "average" of those that are seen; "none".

    Neighbours are neighbours among the row's real tokens, so that padding changes nothing; a token that is no key here
    has no score.

    Args: scores, seen (..., S) of the keys, with one dimension more than keys.slots or none; row (B, span), all tokens
    seen so far, valid = real. Returns (..., S) float32, meaningless where `seen` is False.
    """
    if pooling == "none":
        return scores
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


@in_float32
def attention_sums(tapped: Tapped, queries: Tokens, keys: Tokens, span: int) -> tuple[Tensor, Tensor]:
    """sum over all valid queries i of P_ij, averaged over heads: the attention that key j receives in all. A router's
    `reads`. Returns (B, S) float32 and bool (some query sees it)."""
    total = tapped.key.new_zeros(keys.slots.shape, dtype=torch.float32)
    count = torch.zeros_like(total)
    for chunk in _query_chunks(tapped, queries, keys, None, 0):
        total[:, : chunk.keys] += _probabilities(tapped, chunk).mean(1).sum(1)
        count[:, : chunk.open] += chunk.queries
        count[:, chunk.open : chunk.keys] += chunk.visible.sum(1)
    return total, count > 0


@in_float32
def last_logits(tapped: Tapped, queries: Tokens, keys: Tokens, span: int) -> tuple[Tensor, Tensor]:
    """q k_j of the row's last valid query before the softmax, averaged over heads. A router's `reads`. Returns (B, S)
    float32, also negative, and bool (the query sees the key)."""
    batch, heads, _, size = tapped.query.shape
    slots = torch.where(queries.valid, queries.slots, -1)
    place = slots.argmax(1)[:, None]
    last = tapped.query.gather(2, place[:, None, :, None].expand(batch, heads, 1, size))
    last = last.reshape(batch, tapped.key.shape[1], -1, size).float() * tapped.scaling
    logits = _products(last, tapped.key).flatten(1, 2).mean(1)
    return logits, visible_keys(slots.gather(1, place), keys, tapped.window)[:, 0]


@in_float32
def attention_rank(
    tapped: Tapped, queries: Tokens, keys: Tokens, span: int, iterations: int = 5, damping: float = 0.85
) -> tuple[Tensor, Tensor]:
    """Weighted page rank of the attention graph over that of uniform attention. A router's `reads`.

    s <- (1 - d) / n + d P^T s, `iterations` times from s = 1 / n on the n valid keys, P averaged over heads. In a
    causal graph mass only flows backwards, so that the early tokens lead whatever is attended: the rank is divided by
    the one that P_ij = 1 / n_i gives, and uniform attention scores 1 everywhere [ours]. A key that is no query (`keep`)
    receives and passes nothing on.

    Returns (B, S) float32 and bool (valid). Each iteration is one more pass of Q K^T, in chunks.
    """
    valid = keys.valid.float()
    base = torch.zeros(len(valid), span, device=valid.device).scatter_reduce(1, keys.slots, valid, "amax")
    base = base / base.sum(1, keepdim=True).clamp(min=1)
    rank = even = base
    for _ in range(iterations):
        given, given_even = torch.zeros_like(base), torch.zeros_like(base)
        votes, votes_even = (x.gather(1, queries.slots) * queries.valid for x in (rank, even))
        for chunk in _query_chunks(tapped, queries, keys, None, 0):
            slots = keys.slots[:, : chunk.keys]
            said, flat = _probabilities(tapped, chunk).mean(1), _uniform(chunk)
            given.scatter_add_(1, slots, torch.einsum("bq,bqs->bs", _rows_of(chunk, votes), said))
            given_even.scatter_add_(1, slots, torch.einsum("bq,bqs->bs", _rows_of(chunk, votes_even), flat))
        rank, even = ((1 - damping) * base + damping * x for x in (given, given_even))
    score = rank / even.clamp(min=torch.finfo(torch.float32).tiny)
    return score.gather(1, keys.slots), keys.valid


def _uniform(chunk: _Chunk) -> Tensor:
    """(B, q, keys): 1 / n_i on the keys that each query of the chunk sees."""
    visible = torch.nn.functional.pad(chunk.visible, (chunk.open, 0), value=True)
    return visible / chunk.counts[..., None].clamp(min=1)


def _rows_of(chunk: _Chunk, x: Tensor) -> Tensor:
    """(B, q) of x (B, Q)."""
    return x[:, chunk.index] if isinstance(chunk.index, slice) else x.gather(1, chunk.index)


def _seen_by_all(queries: Tokens, keys: Tokens, start: int, before: int) -> int:
    """How many keys are certainly no later than query `start` of any row. On a CPU the slots themselves are at hand."""
    if keys is queries or keys.slots.device.type != "cpu" or torch.compiler.is_compiling():
        return before + start
    return int((keys.slots <= queries.slots[:, start : start + 1]).sum(1).min())


@dataclass
class _Chunk:
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


def _query_chunks(tapped: Tapped, queries: Tokens, keys: Tokens, last: int | None, before: int):
    """The queries that count, SCORE_CHUNK at a time.

    Where all are valid, the chunk up to query `stop` sees none of the last Q - stop keys, and where keys are valid and
    no window ends, all keys before its own first query: at least `before` + start.
    """
    batch, n = queries.slots.shape
    stored, wanted = keys.slots.shape[1], n if last is None else min(last, n)
    if queries.all_valid:
        bounded = tapped.window is not None or not keys.all_valid
        for start in range(n - wanted, n, SCORE_CHUNK):
            stop = min(start + SCORE_CHUNK, n)
            low, high = 0 if bounded else _seen_by_all(queries, keys, start, before), stored - n + stop
            rest = Tokens(keys.slots[:, low:high], keys.valid[:, low:high], keys.all_valid)
            visible = visible_keys(queries.slots[:, start:stop], rest, tapped.window)
            counts = visible.sum(-1, dtype=torch.float32) + low
            yield _Chunk(slice(start, stop), stop - start, high, low, visible, counts, True)
        return
    rank = torch.where(queries.valid, queries.slots, -1)
    places = rank.topk(wanted, dim=1).indices.sort(dim=1).values
    for index in places.split(SCORE_CHUNK, dim=1):
        usable = queries.valid.gather(1, index)
        visible = visible_keys(queries.slots.gather(1, index), keys, tapped.window) & usable[..., None]
        yield _Chunk(index, index.shape[1], stored, 0, visible, visible.sum(-1, dtype=torch.float32), False)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """q k_j: (B, G, q, S) float32 of query (B, G, q, D) float32 and key (B, G, S, D) of any dtype, without a float32
    copy of all keys."""
    if key.dtype == torch.float32 or key.shape[2] <= KEY_CHUNK:
        return torch.matmul(query, key.float().transpose(2, 3))
    products = query.new_empty(*query.shape[:3], key.shape[2])
    for start in range(0, key.shape[2], KEY_CHUNK):
        some = key[:, :, start : start + KEY_CHUNK].float()
        products[..., start : start + KEY_CHUNK] = torch.matmul(query, some.transpose(2, 3))
    return products


def _probabilities(tapped: Tapped, chunk: _Chunk) -> Tensor:
    """Softmax rows (B, H, q, keys) float32 of the chunk's queries; zeros where a query may see nothing."""
    batch, heads, _, size = tapped.query.shape
    key = tapped.key[:, :, : chunk.keys]
    if isinstance(chunk.index, slice):
        q = tapped.query[:, :, chunk.index]
    else:
        q = tapped.query.gather(2, chunk.index[:, None, :, None].expand(batch, heads, -1, size))
    q = q.reshape(batch, key.shape[1], -1, size)  # the heads of one key head side by side
    # in float32 from the start: the product may not fit float16, and ranks must not depend on the model's dtype
    logits = _products(q.float() * tapped.scaling, key)
    if tapped.softcap is not None:
        logits = tapped.softcap * torch.tanh(logits / tapped.softcap)
    logits = logits.view(batch, heads, chunk.queries, -1)
    logits[..., chunk.open :].masked_fill_(~chunk.visible[:, None], -torch.inf)
    probability = logits.softmax(-1)
    return probability if chunk.certain else probability.nan_to_num_(0.0)
