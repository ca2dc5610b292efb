"""From scores to `keep`: the only place where tokens are counted and chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ftp_lightning.schedule import kept_tokens


@dataclass(frozen=True)
class RoutedPart:
    """The tokens that are routed together: one prompt, or one chunk of it.

    Attributes:
        real: (B, T) bool, False for padding.
        position: (B, T) int64, index among the row's real tokens.
        lengths: real tokens of each row, on the host: counts are known without asking the device.
        reserved: (B, T) bool, always kept: the row's first token (attention sink) and its last (its logits are wanted).
        reserved_counts: how many of those each row has.
        padded: whether any row has padding.
    """

    real: Tensor
    position: Tensor
    lengths: tuple[int, ...]
    reserved: Tensor
    reserved_counts: tuple[int, ...]
    padded: bool

    @staticmethod
    def of(real: Tensor, padded: bool, first_chunk: bool | Sequence[bool] = True) -> RoutedPart:
        """`padded=False` promises that `real` is all True and spares the one look at the device.

        first_chunk: whether the text starts here, of all rows or of each; only then its first token is reserved.
        """
        batch, tokens = real.shape
        position = (
            real.to(torch.int64).cumsum(1) - 1
            if padded
            else torch.arange(tokens, device=real.device).expand(batch, tokens)
        )
        lengths = tuple(real.sum(1).tolist()) if padded else (tokens,) * batch
        last = torch.tensor(lengths, device=real.device)[:, None] - 1
        starts = (first_chunk,) * batch if isinstance(first_chunk, bool) else tuple(first_chunk)
        reserved = real & (position == last)
        if any(starts):
            reserved = reserved | (real & (position == 0) & torch.tensor(starts, device=real.device)[:, None])
        counts = tuple(min(n, 2 if start else 1) for n, start in zip(lengths, starts))
        return RoutedPart(real, position, lengths, reserved, counts, padded)

    @cached_property
    def settled(self) -> tuple[Tensor, Tensor]:
        """Where no score is asked (B, T) bool, and what stands for it: the reserved come first, padding last."""
        return self.reserved | ~self.real, torch.where(self.reserved, torch.inf, -torch.inf)

    def kept(self, sparsity: float) -> tuple[int, ...]:
        """Tokens of each row that enter a block of this sparsity."""
        return tuple(kept_tokens(n, sparsity, r) for n, r in zip(self.lengths, self.reserved_counts))


def choose_topk(score: Tensor, part: RoutedPart, kept: tuple[int, ...], counts: Tensor | None = None) -> Tensor:
    """Exactly `kept[b]` tokens with the highest score in row b, the reserved ones first [ours]; ties go to the earlier
    token.

    Args: score (B, T); counts (B, 1): `kept` where it is on the device already. Returns keep (B, T) bool.
    Invariant: keep.sum(1) == kept, keep <= real.
    """
    where, rank = part.settled
    order = torch.where(where, rank, score).sort(dim=1, descending=True, stable=True).indices
    if len(set(kept)) == 1:
        return torch.zeros_like(part.real).scatter(1, order[:, : kept[0]], True)
    rank = torch.arange(score.shape[1], device=score.device).expand_as(order)
    counts = torch.tensor(kept, device=score.device)[:, None] if counts is None else counts
    return torch.zeros_like(part.real).scatter(1, order, rank < counts)


def choose_threshold(probability: Tensor, part: RoutedPart, threshold: float) -> Tensor:
    """Compute where p_compute > threshold (paper), and the reserved tokens: the realised sparsity floats. (B, T)
    bool."""
    return ((probability > threshold) & part.real) | part.reserved
