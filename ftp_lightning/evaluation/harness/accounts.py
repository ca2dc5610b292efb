"""What an answer stands on: what was really skipped for it, and what that cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ftp_lightning.costs.request import row_costs


class Spent(NamedTuple):
    """FLOPs of a prompt with its answer, and bytes of keys and values that the prompt leaves; dense beside pruned."""

    dense_flops: float
    flops: float
    dense_kv_bytes: float
    kv_bytes: float


@dataclass(frozen=True)
class Answer:
    """One answer of the model.

    Attributes:
        value: (log-probability, greedy) of a continuation, or the text that was generated.
        sparsity: realised mean over the blocks on the routed text.
        skipped: share of the continuation's (token, block) pairs that the decode policy skipped; None where it was not
            watched (generated text, mode "sequence").
        spent: what it cost; None for the dense model.
    """

    value: Any
    sparsity: float = 0.0
    skipped: float | None = None
    spent: Spent | None = None


@dataclass(frozen=True)
class Account:
    """What a score stands on [ours: method, section 8].

    `exercised`: at least half the budget was realised; otherwise the request (too short to be pruned) measured the
    dense model. `truncated`: tokens cut from the left to fit the model. Otherwise as in `Answer`.
    """

    request: tuple | None
    prompt_tokens: int
    continuation_tokens: int
    sparsity: float
    exercised: bool
    truncated: int
    skipped: float | None = None
    spent: Spent | None = None

    @property
    def flops_cut(self) -> float:
        """Share of the FLOPs saved over the whole request; 0 for the dense model."""
        return 0.0 if self.spent is None else 1.0 - self.spent.flops / self.spent.dense_flops


@dataclass(frozen=True)
class Realised:
    """What one routed prompt skipped, and what each of its continuations cost with it."""

    sparsity: float
    spent: list[Spent | None]


def realised_rows(model: Any, pruner: Any, new_tokens: Sequence[Sequence[int]]) -> list[Realised]:
    """One per prompt of the batch that was routed last.

    new_tokens: for each prompt the tokens fed after it in each of its continuations, all of them computed.
    """
    if pruner is None:
        return [Realised(0.0, [None] * len(counts)) for counts in new_tokens]
    trace = pruner.trace.routed
    costs = {}
    for count in {count for counts in new_tokens for count in counts}:
        found = row_costs(model, pruner, trace, count)
        columns = (found.dense_flops, found.flops, found.dense_kv_bytes, found.kv_bytes)
        costs[count] = [Spent(*values) for values in zip(*columns, strict=True)]
    sparsity = trace.row_sparsity.tolist()
    return [Realised(sparsity[row], [costs[n][row] for n in counts]) for row, counts in enumerate(new_tokens)]
