"""What attention says of its keys in other ways than ours: a router names one of these in `Needs.reads`.

Each is (tapped, queries, keys, span) -> (scores, seen), both (B, S); `write_scores` calls it. Shapes as in `scores`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ftp_lightning.pruning.kept import Tokens, visible_keys
from ftp_lightning.pruning.scores import Chunk, Tapped, probabilities, products, query_chunks


def attention_sums(tapped: Tapped, queries: Tokens, keys: Tokens, span: int) -> tuple[Tensor, Tensor]:
    """sum over all valid queries i of P_ij, averaged over heads: the attention that key j receives in all.

    Returns (B, S) float32 and bool (some query sees it)."""
    total = tapped.key.new_zeros(keys.slots.shape, dtype=torch.float32)
    count = torch.zeros_like(total)
    for chunk in query_chunks(tapped, queries, keys, None, 0):
        total[:, : chunk.keys] += probabilities(tapped, chunk).mean(1).sum(1)
        count[:, : chunk.open] += chunk.queries
        count[:, chunk.open : chunk.keys] += chunk.visible.sum(1)
    return total, count > 0


def last_logits(tapped: Tapped, queries: Tokens, keys: Tokens, span: int) -> tuple[Tensor, Tensor]:
    """q k_j of the row's last valid query before the softmax, averaged over heads. Returns (B, S)
    float32, also negative, and bool (the query sees the key)."""
    batch, heads, _, size = tapped.query.shape
    slots = torch.where(queries.valid, queries.slots, -1)
    place = slots.argmax(1)[:, None]
    last = tapped.query.gather(2, place[:, None, :, None].expand(batch, heads, 1, size))
    last = last.reshape(batch, tapped.key.shape[1], -1, size).float() * tapped.scaling
    logits = products(last, tapped.key).flatten(1, 2).mean(1)
    return logits, visible_keys(slots.gather(1, place), keys, tapped.window)[:, 0]


def attention_rank(
    tapped: Tapped, queries: Tokens, keys: Tokens, span: int, iterations: int = 5, damping: float = 0.85
) -> tuple[Tensor, Tensor]:
    """Weighted page rank of the attention graph over that of uniform attention.

    s <- (1 - d) / n + d P^T s, `iterations` times from s = 1 / n on the n valid keys, P averaged over heads. In a
    causal graph mass only flows backwards, so that the early tokens lead whatever is attended: the rank is divided by
    the one that P_ij = 1 / n_i gives, and uniform attention scores 1 everywhere [ours]. A key that is no query (`keep`)
    receives and passes nothing on.

    Returns (B, S) float32 and bool (valid). Each iteration is one more pass of Q K^T, in chunks.
    """
    valid = keys.valid.float()
    base = torch.zeros(len(valid), span, dtype=torch.float32, device=valid.device).scatter_reduce(
        1, keys.slots, valid, "amax"
    )
    base = base / base.sum(1, keepdim=True).clamp(min=1)
    rank = even = base
    for _ in range(iterations):
        given, given_even = torch.zeros_like(base), torch.zeros_like(base)
        votes, votes_even = (x.gather(1, queries.slots) * queries.valid for x in (rank, even))
        for chunk in query_chunks(tapped, queries, keys, None, 0):
            slots = keys.slots[:, : chunk.keys]
            said, flat = probabilities(tapped, chunk).mean(1), _uniform(chunk)
            given.scatter_add_(1, slots, torch.einsum("bq,bqs->bs", _rows_of(chunk, votes), said))
            given_even.scatter_add_(1, slots, torch.einsum("bq,bqs->bs", _rows_of(chunk, votes_even), flat))
        rank, even = ((1 - damping) * base + damping * x for x in (given, given_even))
    score = rank / even.clamp(min=torch.finfo(torch.float32).tiny)
    return score.gather(1, keys.slots), keys.valid


def _uniform(chunk: Chunk) -> Tensor:
    """(B, q, keys): 1 / n_i on the keys that each query of the chunk sees."""
    visible = torch.nn.functional.pad(chunk.visible, (chunk.open, 0), value=True)
    return visible / chunk.counts[..., None].clamp(min=1)


def _rows_of(chunk: Chunk, x: Tensor) -> Tensor:
    """(B, q) of x (B, Q)."""
    return x[:, chunk.index] if isinstance(chunk.index, slice) else x.gather(1, chunk.index)
