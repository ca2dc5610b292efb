"""Decode policies: which continuation tokens skip a block, decided causally (paper, Section 4.4).

Shapes: B rows, T continuation tokens of this forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ftp_lightning.pruning.cache import RoutedLayer

DECODE = ("dense", "threshold", "strict")
PROMPT, COMPUTED, SKIPPED = 0, 1, 2
"""What an account says of a slot: prompt (or padding), a continuation token that was computed, one that skipped."""


def below_threshold(probability: Tensor, real: Tensor, threshold: float) -> Tensor:
    """`threshold`: skip where p_compute < threshold. (B, T) bool, True = skips."""
    return (probability < threshold) & real


def within_allowance(probability: Tensor, real: Tensor, sparsity: float, account: Tensor) -> Tensor:
    """`strict`: a row skips iff p_compute < 0.5 and skipped + 1 <= s_l (generated + 1), token after token.

    account (B, past) uint8 says what the row's earlier tokens did; `skipped` and `generated` count its continuation
    tokens in this block. (B, T) bool, True = skips.
    """
    skipped, generated = (account == SKIPPED).sum(1), (account != PROMPT).sum(1)
    wants, skips = (probability < 0.5) & real, []
    for token in range(real.shape[1]):
        allowed = skipped + 1 <= sparsity * (generated + 1).to(torch.float64)
        skips.append(wants[:, token] & allowed)
        skipped, generated = skipped + skips[-1], generated + real[:, token]
    return torch.stack(skips, 1)


def account_of(layer: RoutedLayer, part: str, real: Tensor, past: int) -> Tensor:
    """(B, past) uint8: what the tokens before this forward did in this part of the block; what an error has stopped
    after its decision does not count."""
    known = layer.account.get(part, real.new_zeros((len(real), 0), dtype=torch.uint8))[:, :past]
    missing = past - known.shape[1]
    return torch.cat([known, known.new_zeros((len(real), missing))], 1) if missing else known


def enter(layer: RoutedLayer, part: str, account: Tensor, skips: Tensor, real: Tensor) -> None:
    """Add this forward's tokens to the account, where it lives with the cache."""
    entry = torch.where(skips, SKIPPED, COMPUTED) * real
    layer.account[part] = torch.cat([account, entry.to(torch.uint8)], 1)
