"""The attention every token receives, without ever making a T x T matrix.

Shapes: B rows, H query heads, G = key heads, Q queries, S keys, D head size.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ftp_lightning.pruning.blocks import sliding_window

TAP = "ftp_lightning_tap"
_CHUNK = 128


@dataclass(frozen=True)
class Tokens:
    """Which tokens a tensor of queries or keys holds: slots (B, n) int64, valid (B, n) bool; `all_valid` spares
    masks."""

    slots: Tensor
    valid: Tensor
    all_valid: bool

    def followed_by(self, other: Tokens) -> Tokens:
        slots, valid = torch.cat([self.slots, other.slots], 1), torch.cat([self.valid, other.valid], 1)
        return Tokens(slots, valid, self.all_valid and other.all_valid)

    def first(self, n: int) -> Tokens:
        return Tokens(self.slots[:, :n], self.valid[:, :n], self.all_valid)


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
    total, count = 0.0, 0
    for index, usable in _query_chunks(queries, last):
        probability, visible = _probabilities(tapped, queries, keys, index, usable)
        weight = visible.sum(-1, keepdim=True).to(torch.float32) * usable[..., None]
        total = total + (probability * weight).sum(1)
        count = count + (visible & usable[..., None]).sum(1)
    return total / count.clamp(min=1), count > 0


def _query_chunks(queries: Tokens, last: int | None):
    """(index (B, q) into the queries, usable (B, q) bool) for chunks of the queries that count."""
    batch, n = queries.slots.shape
    wanted = n if last is None else min(last, n)
    if queries.all_valid:
        index = torch.arange(n - wanted, n, device=queries.slots.device).expand(batch, wanted)
    else:
        rank = torch.where(queries.valid, queries.slots, -1)
        index = rank.topk(wanted, dim=1).indices.sort(dim=1).values
    usable = queries.valid.gather(1, index)
    return zip(index.split(_CHUNK, dim=1), usable.split(_CHUNK, dim=1))


def _probabilities(
    tapped: Tapped, queries: Tokens, keys: Tokens, index: Tensor, usable: Tensor
) -> tuple[Tensor, Tensor]:
    """Head-averaged softmax rows (B, q, S) float32 of the chosen queries, and what each may see (B, q, S) bool."""
    batch, heads, _, size = tapped.query.shape
    groups = tapped.key.shape[1]
    q = tapped.query.gather(2, index[:, None, :, None].expand(batch, heads, -1, size))
    q = q.reshape(batch, groups, -1, size)  # the heads of one key head side by side
    # in float32 from the start: the product may not fit float16, and ranks must not depend on the model's dtype
    logits = torch.matmul(q.float() * tapped.scaling, tapped.key.float().transpose(2, 3))
    if tapped.softcap is not None:
        logits = tapped.softcap * torch.tanh(logits / tapped.softcap)
    logits = logits.view(batch, heads, index.shape[1], -1)
    visible = visible_keys(queries.slots.gather(1, index), keys, tapped.window) & usable[..., None]
    probability = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1).mean(1)
    return torch.where(visible, probability, 0.0), visible


def visible_keys(query_slots: Tensor, keys: Tokens, window: int | None) -> Tensor:
    """(B, Q, S) bool: key j is no later than query i, valid, and within the block's sliding window."""
    distance = query_slots[:, :, None] - keys.slots[:, None, :]
    visible = (distance >= 0) & keys.valid[:, None, :]
    return visible if window is None else visible & (distance < window)


def tap_attention(attention: nn.Module, listener: Callable[[nn.Module, Tapped], None]) -> Callable[[], None]:
    """Let `listener` see queries and keys of this module's attention, which is computed by the very function as before.

    The module gets a copy of its config that names our attention function; the model's own config, and hence its masks,
    stay as they are. Returns the function that undoes it.
    """
    if TAP not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(TAP, _tapped_attention)
    original = attention.config
    tapped = copy.copy(original)
    tapped._attn_implementation_internal = TAP
    attention.config = tapped
    attention._ftp_tap = (original._attn_implementation, listener)

    def undo() -> None:
        attention.config = original
        del attention._ftp_tap

    return undo


def _tapped_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    """Report to the module's listener, then attend as the model's own implementation does."""
    implementation, listener = module._ftp_tap
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    listener(module, Tapped(query, key, scaling, kwargs.get("softcap"), sliding_window(module)))
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return attend(module, query, key, value, attention_mask, **kwargs)
