"""From scores to `keep`: the only place where tokens are counted and chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ftp_lightning.schedule import kept_tokens, reserved_tokens


@dataclass(frozen=True)
class RoutedTokens:
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
    def of(real: Tensor, padded: bool, first_chunk: bool | Sequence[bool] = True) -> RoutedTokens:
        """`padded=False` promises that `real` is all True and spares the one look at the device.

        first_chunk: whether the text starts here, of all rows or of each; only then its first token is reserved.
        """
        batch, tokens = real.shape
        if padded:
            position = real.to(torch.int64).cumsum(1) - 1
            lengths = tuple(real.sum(1).tolist())
            last = real & (position == position[:, -1:])
        else:
            position = torch.arange(tokens, device=real.device).expand(batch, tokens)
            lengths = (tokens,) * batch
            last = position == tokens - 1
        starts = (first_chunk,) * batch if isinstance(first_chunk, bool) else tuple(first_chunk)
        first = real & (position == 0)
        if not all(starts):
            first = first & torch.tensor(starts, device=real.device)[:, None]
        counts = tuple(reserved_tokens(n, start) for n, start in zip(lengths, starts))
        return RoutedTokens(real, position, lengths, last | first, counts, padded)

    @cached_property
    def settled(self) -> tuple[Tensor, Tensor]:
        """Where no score is asked (B, T) bool, and what stands for it: the reserved come first, padding last."""
        return self.reserved | ~self.real, torch.where(self.reserved, torch.inf, -torch.inf)

    def counts(self, sparsity: float) -> tuple[int, ...]:
        """How many tokens of each row enter a block of this sparsity."""
        return tuple(kept_tokens(n, sparsity, r) for n, r in zip(self.lengths, self.reserved_counts))


def choose_topk(
    score: Tensor, routed: RoutedTokens, counts: tuple[int, ...], on_device: Tensor | None = None
) -> Tensor:
    """Exactly `counts[b]` tokens with the highest score in row b, the reserved ones first [ours].

    Ties go to the earlier token.

    Args:
        score: (B, T).
        counts: kept tokens of each row.
        on_device: (B, 1), `counts` where the score is, if it is there already.

    Returns:
        keep (B, T) bool. Invariant: keep.sum(1) == counts, keep <= real.
    """
    where, rank = routed.settled
    order = torch.where(where, rank, score).sort(dim=1, descending=True, stable=True).indices
    if len(set(counts)) == 1:
        return torch.zeros_like(routed.real).scatter(1, order[:, : counts[0]], True)
    rank = torch.arange(score.shape[1], device=score.device).expand_as(order)
    wanted = torch.tensor(counts, device=score.device)[:, None] if on_device is None else on_device
    return torch.zeros_like(routed.real).scatter(1, order, rank < wanted)


def choose_threshold(probability: Tensor, routed: RoutedTokens, threshold: float) -> Tensor:
    """Compute where p_compute > threshold (paper), and the reserved tokens: the realised sparsity floats. (B, T)
    bool."""
    return ((probability > threshold) & routed.real) | routed.reserved
