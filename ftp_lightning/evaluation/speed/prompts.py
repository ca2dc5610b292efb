"""Random prompts to time and weigh: all of one length, or left padded to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.devices import home


@dataclass(frozen=True)
class Prompts:
    """`ids` (B, T) int64 and, where rows are padded on the left, their `mask` (B, T) int64: 0 on padding."""

    ids: Tensor
    mask: Tensor | None = None

    @property
    def arguments(self) -> dict[str, Tensor]:
        """What a model is called with."""
        return {"input_ids": self.ids} if self.mask is None else {"input_ids": self.ids, "attention_mask": self.mask}

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return tuple(self.ids.shape)

    @property
    def last_place(self) -> Tensor:
        """The `logits_to_keep` that asks for the last token's logits alone, by its index.

        Asked by number (1), the model takes a slice, and a bfloat16 head on a CPU copies all its weights to multiply a
        slice: 60 ms of a 0.9 s prefill of the 110 M shape, stock and pruned alike, that no pruner can save.
        """
        return self.ids.new_tensor([-1])

    def last(self, tokens: int) -> Prompts:
        """The last `tokens` columns."""
        return Prompts(self.ids[:, -tokens:], None if self.mask is None else self.mask[:, -tokens:])


def mixed_lengths(length: int, batch: int) -> list[int]:
    """`batch` lengths spread evenly between a quarter of `length` (rounded up) and `length`, longest first."""
    shortest = -(-length // 4)
    return [round(length - row * (length - shortest) / max(batch - 1, 1)) for row in range(batch)]


def random_prompts(model, length: int, batch: int, mixed: bool = False, *, generator: torch.Generator) -> Prompts:
    """`batch` rows of uniformly random tokens on the model's device, `mixed`: of `mixed_lengths`, left padded.

    generator: on the CPU. UserError where the model's positions end before `length`.
    """
    limit = positions(model) or length
    if length > limit:
        raise UserError(f"length is {length}, the model takes {limit} tokens\nMeasure a shorter prompt.")
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(home(model))
    if not mixed or batch == 1:
        return Prompts(ids)
    lengths = torch.tensor(mixed_lengths(length, batch), device=ids.device)
    mask = torch.arange(length, device=ids.device) >= length - lengths[:, None]
    return Prompts(ids * mask, mask.to(torch.int64))


def positions(model) -> int | None:
    """Tokens that the model takes; None where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
