"""Rows: a prompt that is routed and the continuation that follows it, on which everything is measured and trained.

Shapes: B rows of a batch, P tokens of its longest prompt, C of its longest continuation.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NotRequired, TypedDict, cast

import torch
from torch import Tensor


class Batch(TypedDict):
    """Rows side by side; `attention_mask` where something is padded."""

    input_ids: Tensor
    prompt_tokens: int
    attention_mask: NotRequired[Tensor]


@dataclass(frozen=True)
class Row:
    """One prompt and what follows it, as token ids.

    Attributes:
        continuation: empty where it is not known yet, see `evaluation.own_answers`.
        kind: what the row is, for example "plain", "recall" or "chat".
        document: index of the document or record that it comes from.
    """

    prompt: list[int]
    continuation: list[int]
    kind: str = "plain"
    document: int = 0


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of any length.

    Attributes:
        left_out: reason -> how many records of the source gave no row.
        cut: how many continuations were cut to a limit.
    """

    rows: list[Row]
    left_out: Mapping[str, int] = field(default_factory=dict)
    cut: int = 0

    def __post_init__(self) -> None:
        if not all(row.prompt for row in self.rows):
            raise ValueError("a row without prompt tokens cannot be routed")

    @staticmethod
    def even(input_ids: Tensor, prompt_tokens: int, kinds: Sequence[str], documents: Sequence[int]) -> Rows:
        """Rows of one length, `input_ids` (n, P + C), whose first `prompt_tokens` tokens are the prompt."""
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
            raise ValueError(f"input_ids must be int64 (n, P + C), got {input_ids.dtype} {tuple(input_ids.shape)}")
        if not 0 < prompt_tokens < input_ids.shape[1]:
            raise ValueError(f"prompt_tokens is {prompt_tokens}, must be within rows of {input_ids.shape[1]} tokens")
        if not len(kinds) == len(documents) == len(input_ids):
            raise ValueError(
                f"{len(input_ids)} rows, {len(kinds)} kinds and {len(documents)} documents must be equal in number"
            )
        cells = zip(input_ids.tolist(), kinds, documents)
        return Rows([Row(ids[:prompt_tokens], ids[prompt_tokens:], kind, place) for ids, kind, place in cells])

    def __len__(self) -> int:
        return len(self.rows)

    def __add__(self, other: Rows) -> Rows:
        """The rows of both, and what both left out."""
        names = {**self.left_out, **other.left_out}
        left_out = {name: self.left_out.get(name, 0) + other.left_out.get(name, 0) for name in names}
        return Rows(self.rows + other.rows, left_out, self.cut + other.cut)

    @property
    def kinds(self) -> list[str]:
        return [row.kind for row in self.rows]

    @property
    def documents(self) -> list[int]:
        return [row.document for row in self.rows]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(prompt tokens, continuation tokens) of each row."""
        return [(len(row.prompt), len(row.continuation)) for row in self.rows]

    @property
    def one_shape(self) -> bool:
        """Whether all rows are alike in length, so that no batch has padding."""
        return len(set(self.shapes)) <= 1

    @property
    def prompt_tokens(self) -> int:
        """P of the longest prompt; 0 without rows."""
        return max((prompt for prompt, _ in self.shapes), default=0)

    @property
    def continuation_tokens(self) -> int:
        """C of the longest continuation; 0 without rows."""
        return max((continuation for _, continuation in self.shapes), default=0)

    @property
    def input_ids(self) -> Tensor:
        """All rows side by side, (n, P + C), padded as in `batch`."""
        return self.batch(range(len(self)))["input_ids"]

    def batch(self, rows: Sequence[int]) -> Batch:
        """These rows side by side: prompts padded on the left to P, continuations on the right to C.

        Returns `{"input_ids": (B, P + C) int64, "prompt_tokens": P}`, and `"attention_mask"` (B, P + C) int64 where
        something is padded. `pruning.kept.padding_arguments` says what a model is then given.
        """
        chosen = [self.rows[row] for row in rows]
        prompt, continuation = max(len(row.prompt) for row in chosen), max(len(row.continuation) for row in chosen)
        ids = torch.zeros(len(chosen), prompt + continuation, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(chosen):
            place = slice(prompt - len(row.prompt), prompt + len(row.continuation))
            ids[number, place], mask[number, place] = torch.tensor(row.prompt + row.continuation), 1
        if mask.all():
            return {"input_ids": ids, "prompt_tokens": prompt}
        return {"input_ids": ids, "prompt_tokens": prompt, "attention_mask": mask}

    @property
    def order(self) -> list[int]:
        """The rows by length, those of one length in their own order: neighbours need the least padding."""
        shapes = self.shapes
        return sorted(range(len(self)), key=shapes.__getitem__)

    def batches(self, size: int) -> Iterator[tuple[list[int], Batch]]:
        """Row numbers and batch, `size` rows at a time in `order`. Rows of one length come as they are, unpadded."""
        order = self.order
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            yield rows, self.batch(rows)

    def subset(self, indices: Iterable[int]) -> Rows:
        """The rows `indices`, in that order; the counts stay those of the whole."""
        return replace(self, rows=[self.rows[index] for index in indices])

    def sample(self, count: int | None, seed: int) -> Rows:
        """`count` rows in a random order, or all where there are fewer; the first n are the same for every count."""
        order = list(range(len(self)))
        random.Random(f"{seed}/examples").shuffle(order)
        return self.subset(order[:count])

    def prompts(self) -> Rows:
        """The same prompts without their continuations."""
        return replace(self, rows=[replace(row, continuation=[]) for row in self.rows])

    def hash(self) -> str:
        """sha256 (hex) over tokens, where prompts and continuations end, kinds and documents."""
        head = repr([(len(row.prompt), len(row.continuation), row.kind, row.document) for row in self.rows])
        ids = torch.tensor([token for row in self.rows for token in row.prompt + row.continuation], dtype=torch.int64)
        return hashlib.sha256(head.encode() + ids.numpy().tobytes()).hexdigest()

    def counts(self) -> dict[str, int]:
        """How many rows there are, how many continuations were cut, and what was left out, to be logged."""
        return {"rows": len(self), "cut": self.cut, **self.left_out}


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return cast(Batch, {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()})


def scored_tokens(batch: Batch) -> Tensor | None:
    """(B, C) bool, the real tokens of the continuations; None = all."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask[:, batch["prompt_tokens"] :].bool()
