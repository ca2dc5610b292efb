"""Training under `evict`: that a skipped token's key and value vanish for all others gets a gradient too [ours].

A hard mask has none, so the block's gate alone says what a token gains by being computed, and nothing of what the
others lose when it is not. Here a key carries its token's gate g_j, 0 or 1 forward,

    out_i = sum_j g_j e^(s_ij) v_j / sum_j g_j e^(s_ij),

and backward it counts, as a block's gate does, by what the decision changes:

    d out_i / d g_j = out_i with key j - out_i without = w_ij (v_j - out_i),

where r_ij = e^(s_ij) / Z_i, Z_i the sum over the keys that are seen, and w = r / (1 + r) for a hidden key, r / (1 - r)
for one that is seen. The derivative r (v - out) itself has no bound where a hidden key is what a query looks for.

Shapes: B rows, H query heads, G key heads, Q queries, S keys, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 128
"""Queries whose logits are made at once in backward [ours]."""
MOST = 10.0
"""A query that sees next to nothing but one key would lose everything without it: w is cut here [ours]."""


def gated_keys(output: Tensor, gate: Tensor, query: Tensor, key: Tensor, value: Tensor, sight, scale: float) -> Tensor:
    """`output` (B, Q, H, D) of an attention under the hard decision, with a gradient to the gates (B, S) of its keys.

    A token always sees its own key, so that its own gate gets nothing from it. Queries, keys and values get the
    gradient of the hard decision.
    """
    return _GatedKeys.apply(output, gate, query.detach(), key.detach(), value.detach(), sight, scale)


class _GatedKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, gate, query, key, value, sight, scale):
        ctx.save_for_backward(output, gate, query, key, value)
        ctx.sight, ctx.scale = sight, scale
        return output.view_as(output)

    @staticmethod
    def backward(ctx, upstream):
        output, gate, query, key, value = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        gradient = torch.zeros_like(gate)
        for start in range(0, query.shape[2], CHUNK):
            stop = min(start + CHUNK, query.shape[2])
            out, up = (x[:, start:stop].transpose(1, 2) for x in (output, upstream))
            weight = _weights(query[:, :, start:stop], key, ctx.sight, ctx.scale, start, stop)
            gain = up @ value.transpose(-1, -2) - (up * out).sum(-1, keepdim=True)
            gradient += (weight * gain).sum((1, 2)).to(gate.dtype)
        return upstream, gradient, None, None, None, None, None


def _weights(query: Tensor, key: Tensor, sight, scale: float, start: int, stop: int) -> Tensor:
    """w_ij (B, H, q, S) of every key that is seen or would be, were it kept; 0 of a query's own key."""
    seen = sight.mask(start, stop, 0, key.shape[2])
    logits = (query @ key.transpose(-1, -2)).float() * scale
    share = (logits - logits.masked_fill(~seen, -torch.inf).logsumexp(-1, keepdim=True)).exp()
    weight = torch.where(seen, share / (1 - share).clamp(min=1e-6), 1 / (1 + 1 / share))
    return weight.clamp(max=MOST).masked_fill(~sight.reachable(start, stop), 0.0).to(query.dtype)
