"""The four low-dimensional factors of the paper's router (Section 4.3), per token and block."""

from __future__ import annotations

import torch
from torch import Tensor

from ftp_lightning.routing.base import RoutingContext

FACTORS = ("position", "attention", "rank", "sparsity")
TIE = 1e-6
"""Scores closer than this share a rank, so that rounding noise does not decide."""


def position_factor(context: RoutingContext) -> Tensor:
    """i / (T-1) with T the row's real length; a single token has position 1, as has every continuation token. (B,
    T)."""
    known = context.memo.get(position_factor)
    if known is None:  # the same in all blocks
        last = (context.lengths - 1).to(torch.float32)
        fraction = context.position.to(torch.float32) / last.clamp(min=1)
        known = context.memo[position_factor] = torch.where(last > 0, fraction, torch.ones_like(fraction))
    return known


def attention_factor(context: RoutingContext) -> Tensor:
    """log1p of the latest attention score; the score is 1 under uniform attention [ours: the paper does not scale]. (B,
    T)."""
    return torch.log1p(context.attention)


def rank_factor(context: RoutingContext) -> Tensor:
    """Ascending rank of the attention score among the row's real tokens, over n-1: in [0, 1], ties averaged. (B, T).

    At decode it comes with the context: each token ranks among those up to itself.
    """
    if context.rank is not None:
        return context.rank
    rank = average_rank(context.attention, context.real if context.padded else None)
    return rank / (context.lengths - 1).clamp(min=1).to(torch.float32)


def sparsity_factor(context: RoutingContext) -> Tensor:
    """The schedule's requirement s_l, the same for every token. (B, T)."""
    return torch.full(context.position.shape, context.sparsity, dtype=torch.float32, device=context.position.device)


_FACTOR = {"position": position_factor, "attention": attention_factor, "rank": rank_factor, "sparsity": sparsity_factor}


def read_attention(names: tuple[str, ...]) -> bool:
    """Whether any of these factors comes from the attention table."""
    return "attention" in names or "rank" in names


def factors(context: RoutingContext, names: tuple[str, ...] = FACTORS) -> Tensor:
    """(B, T, len(names)) float32; padding holds zeros, so that nothing undefined reaches the router."""
    stacked = torch.stack([_FACTOR[name](context) for name in names], dim=-1)
    return stacked.masked_fill(~context.real[..., None], 0.0) if context.padded else stacked


def average_rank(values: Tensor, real: Tensor | None) -> Tensor:
    """Ascending ranks 0 .. n-1 of the real entries of each row; neighbours within TIE share the mean of their ranks.

    Args: values (B, T) float; real (B, T) bool, None = all. Returns (B, T) float32; entries of padding are
    meaningless.
    """
    values = values if real is None else values.masked_fill(~real, torch.inf)
    ordered, order = values.sort(dim=1, stable=True)
    step = ordered.diff(dim=1) > TIE  # inf - inf is nan, and nan > TIE is False: padding forms one group at the end
    group = torch.cat([torch.zeros_like(order[:, :1]), step.to(order.dtype).cumsum(1)], dim=1)
    index = torch.arange(values.shape[1], device=values.device, dtype=torch.float32).expand_as(values)
    total = torch.zeros_like(index).scatter_add(1, group, index)
    members = torch.zeros_like(index).scatter_add(1, group, torch.ones_like(index))
    mean = (total / members.clamp(min=1)).gather(1, group)
    return torch.empty_like(index).scatter(1, order, mean)
