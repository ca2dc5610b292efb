"""The attention every token receives, without ever making a T x T matrix.

Shapes: B rows, H query heads, G = key heads, Q queries, S keys, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ftp_lightning.pruning.tokens import Tokens, visible_keys

SCORE_CHUNK = 128
"""Queries whose probabilities are held at once [ours]: B x H x 128 x S numbers."""


@dataclass
class Tapped:
    """What the attention of one block was computed from: query (B, H, Q, D), key (B, G, S, D), after the rotary
    embedding."""

    query: Tensor
    key: Tensor
    scaling: float
    softcap: float | None
    window: int | None


def received_attention(tapped: Tapped, queries: Tokens, keys: Tokens, last: int | None) -> tuple[Tensor, Tensor]:
    """Attention score of every key [ours, method.md section 4]:

        a_j = mean over heads and over those queries i in Q that may see j, of n_i * P_ij

    with n_i the number of keys visible to query i (uniform attention gives 1 in every mode), and Q the row's last
    `min(last, valid)` valid queries (`window`), or all of them (`last=None`, `exact`, in chunks of 128 queries).

    Returns: scores (B, S) float32, seen (B, S) bool: False where no query of Q sees the key; its score is then
    meaningless.
    """
    batch, stored = keys.slots.shape
    total = tapped.key.new_zeros(batch, stored, dtype=torch.float32)
    count = torch.zeros_like(total)
    for index, usable, high in _query_chunks(queries, stored, last):
        seen = keys.first(high)
        probability, visible = _probabilities(tapped, queries, seen, index, usable)
        weight = visible.sum(-1, keepdim=True).to(torch.float32)
        total[:, :high] += (probability * weight).sum(1)
        count[:, :high] += visible.sum(1)
    return total / count.clamp(min=1), count > 0


def received_by_query(tapped: Tapped, queries: Tokens, keys: Tokens) -> tuple[Tensor, Tensor]:
    """n_i * P_ij, averaged over heads, of every query: what each one alone says of its keys. (B, Q, S) float32 and bool
    (visible)."""
    scores, seen = [], []
    for index, usable, _ in _query_chunks(queries, keys.slots.shape[1], None):
        probability, visible = _probabilities(tapped, queries, keys, index, usable)
        scores.append(probability * visible.sum(-1, keepdim=True))
        seen.append(visible)
    return torch.cat(scores, 1), torch.cat(seen, 1)


def _query_chunks(queries: Tokens, stored: int, last: int | None):
    """(index (B, q) into the queries, or a slice where rows are alike; usable (B, q) bool or None; keys that count).

    Where queries are valid and all of them count, the chunk up to query `stop` sees none of the last Q - stop keys.
    """
    batch, n = queries.slots.shape
    wanted = n if last is None else min(last, n)
    if queries.all_valid:
        for start in range(n - wanted, n, SCORE_CHUNK):
            stop = min(start + SCORE_CHUNK, n)
            yield slice(start, stop), None, stored - n + stop
        return
    rank = torch.where(queries.valid, queries.slots, -1)
    index = rank.topk(wanted, dim=1).indices.sort(dim=1).values
    usable = queries.valid.gather(1, index)
    for chunk, valid in zip(index.split(SCORE_CHUNK, dim=1), usable.split(SCORE_CHUNK, dim=1)):
        yield chunk, valid, stored


def _probabilities(
    tapped: Tapped, queries: Tokens, keys: Tokens, index: Tensor | slice, usable: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Head-averaged softmax rows (B, q, S) float32 of the chosen queries, and what each may see (B, q, S) bool."""
    batch, heads, _, size = tapped.query.shape
    key = tapped.key[:, :, : keys.slots.shape[1]]
    if isinstance(index, slice):
        q, slots = tapped.query[:, :, index], queries.slots[:, index]
    else:
        q = tapped.query.gather(2, index[:, None, :, None].expand(batch, heads, -1, size))
        slots = queries.slots.gather(1, index)
    q = q.reshape(batch, key.shape[1], -1, size)  # the heads of one key head side by side
    # in float32 from the start: the product may not fit float16, and ranks must not depend on the model's dtype
    logits = torch.matmul(q.float() * tapped.scaling, key.float().transpose(2, 3))
    if tapped.softcap is not None:
        logits = tapped.softcap * torch.tanh(logits / tapped.softcap)
    logits = logits.view(batch, heads, slots.shape[1], -1)
    visible = visible_keys(slots, keys, tapped.window)
    if usable is not None:
        visible = visible & usable[..., None]
    probability = logits.masked_fill_(~visible[:, None], -torch.inf).softmax(-1).mean(1)
    return torch.where(visible, probability, 0.0), visible
