"""Replays decisions: to reproduce a trace, to test, to measure one decision against another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ftp_lightning.routing.base import Router, check_made_for


class FixedRouter(Router):
    """Obeys its lists alone: no schedule, no reservation, no choice.

    Args:
        keep: one bool tensor (B, T) per block; True = the token enters the block. False on padding.
        keep_attention, keep_mlp: instead of `keep`, the same for the two parts of a block. A part without a list is
            computed for all real tokens.

    Attributes:
        keep, keep_attention, keep_mlp: the lists; with `keep` given all three are the same, else `keep` is None.
        by_parts: the parts are decided apart; a decision must then name one.
        shape: (B, T) of every entry.
        num_blocks: entries per list.

    Raises:
        ValueError: `keep` beside lists of parts, or none at all; entries of different shapes, not two-dimensional, or
        of numbers other than 0 and 1; lists of different lengths. A prompt of another shape is refused when it comes.
    """

    def __init__(
        self,
        keep: Sequence[Tensor] | None = None,
        *,
        keep_attention: Sequence[Tensor] | None = None,
        keep_mlp: Sequence[Tensor] | None = None,
    ):
        super().__init__()
        self.by_parts = keep is None
        if self.by_parts == (keep_attention is None and keep_mlp is None):
            raise ValueError("FixedRouter wants either `keep`, or `keep_attention` or `keep_mlp` or both")
        self.keep = _masks(keep)
        self.keep_attention = _masks(keep_attention) if self.by_parts else self.keep
        self.keep_mlp = _masks(keep_mlp) if self.by_parts else self.keep
        named = {"block": self.keep, "attention": self.keep_attention, "mlp": self.keep_mlp}
        lists = [masks for masks in named.values() if masks is not None]
        shapes = {tuple(mask.shape) for masks in lists for mask in masks}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2 or len({len(masks) for masks in lists}) != 1:
            raise ValueError(
                f"FixedRouter wants one (batch, tokens) mask per block, all alike; got shapes {sorted(shapes)}, "
                f"{sorted({len(masks) for masks in lists})} blocks"
            )
        self.shape: tuple[int, int] = next(iter(shapes))
        self.num_blocks = len(lists[0])
        # Copies on the host, so that counts are known without asking the device; a decision is sent there once.
        self._host = {part: None if m is None else [mask.cpu() for mask in m] for part, m in named.items()}
        held = [masks for masks in self._host.values() if masks is not None]
        self._all_kept = [all(bool(masks[block].all()) for masks in held) for block in range(self.num_blocks)]
        self._sent: dict[tuple[str, int, torch.device], Tensor] = {}

    def identity(self) -> list:
        """As of every router, with the decisions by content: `config` does not hold them."""
        masks = hashlib.sha256()
        for part, held in self._host.items():
            masks.update(part.encode() + b"".join(mask.numpy().tobytes() for mask in held or ()))
        return [*super().identity(), masks.hexdigest()[:16]]

    def decision(self, block: int, real: Tensor, part: str = "block", past: int = 0, longer: bool = False) -> Tensor:
        """(B, T) bool for the real tokens of this block, on their device.

        Args:
            real: (B, T) bool.
            part: "block", "attention" or "mlp".
            past, longer: with `longer` the lists address slots, of which [past, past + T) are asked; without, they are
                what is asked, and `past` is ignored.

        Raises:
            ValueError: `real` has another shape than the lists or, with `longer`, reaches beyond them.
        """
        batch, tokens = real.shape
        masks = self._of(part)
        if longer:
            self._check_slots(batch, past, tokens)
        elif tuple(real.shape) != self.shape:
            raise ValueError(f"FixedRouter holds decisions of shape {self.shape}, the prompt is {tuple(real.shape)}")
        if masks is None:
            return real.clone()
        key = part, block, real.device
        if key not in self._sent:
            self._sent[key] = masks[block].to(real.device)
        keep = self._sent[key]
        return (keep[:, past : past + tokens] if longer else keep) & real

    def host_counts(
        self, block: int, rows: int, part: str = "block", past: int = 0, tokens: int | None = None
    ) -> tuple[int, ...]:
        """Kept tokens of each of the `rows` rows, read on the host: of the slots [past, past + tokens), up to the end
        where `tokens` is None. Knows nothing of padding: for batches without any."""
        tokens = self.shape[1] - past if tokens is None else tokens
        self._check_slots(rows, past, tokens)
        masks = self._of(part)
        if masks is None:
            return (tokens,) * rows
        return tuple(masks[block][:, past : past + tokens].sum(1).tolist())

    def is_all_kept(self, block: int) -> bool:
        """Whether every token enters this block, in all its parts; known on the host."""
        return self._all_kept[block]

    def check_model(self, num_blocks: int, hidden_size: int) -> None:
        check_made_for("blocks", self.num_blocks, num_blocks)

    def _of(self, part: str) -> list[Tensor] | None:
        """The list of a part, on the host; None where it is computed for all."""
        if part == "block" and self.by_parts:
            raise ValueError("this FixedRouter decides attention and mlp apart; ask for one of them")
        return self._host[part]

    def _check_slots(self, rows: int, past: int, tokens: int) -> None:
        if rows != self.shape[0] or past < 0 or past + tokens > self.shape[1]:
            raise ValueError(
                f"FixedRouter holds decisions of shape {self.shape}, asked are slots {past} to {past + tokens}: "
                f"shape {(rows, past + tokens)}"
            )


def _masks(keep: Sequence[Tensor] | None) -> list[Tensor] | None:
    """The lists as bool tensors; ValueError for probabilities, which say nothing about who is kept."""
    if keep is None:
        return None
    masks = [torch.as_tensor(mask) for mask in keep]
    kept = [mask.to(torch.bool) for mask in masks]
    if any(mask.is_floating_point() and not mask.equal(own.to(mask)) for mask, own in zip(masks, kept)):
        raise ValueError("FixedRouter wants masks of bool, or of 0 and 1; these hold other numbers")
    return kept
