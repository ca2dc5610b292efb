"""What an answer stands on: what was really skipped for it, and the FLOPs that saved.

Shapes: B rows of a batch of prompts, T prompt tokens, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ftp_lightning.pruning.costs import BlockCost
from ftp_lightning.pruning.flops import block_costs, continuation_flops, head_flops, realised_flops
from ftp_lightning.pruning.trace import Trace


@dataclass(frozen=True)
class Answer:
    """`value`: (log-probability, greedy) of a continuation, or the text that was generated.

    sparsity: realised mean over the blocks on the routed text. skipped: share of the continuation's (token, block)
    pairs that the decode policy skipped; None where it was not watched (generated text, mode "sequence"). flops_cut:
    share of the FLOPs saved over the whole request, its continuation counted as computed densely.
    """

    value: Any
    sparsity: float = 0.0
    skipped: float | None = None
    flops_cut: float = 0.0


@dataclass(frozen=True)
class Account:
    """What a score stands on [ours: method, section 8].

    `sparsity`, `skipped`, `flops_cut` as in `Answer`. `exercised`: at least half the budget was realised; otherwise the
    request (too short to be pruned) measured the dense model. `truncated`: tokens cut from the left to fit the model.
    """

    request: tuple | None
    prompt_tokens: int
    continuation_tokens: int
    sparsity: float
    exercised: bool
    truncated: int
    skipped: float | None = None
    flops_cut: float = 0.0


class Realised:
    """What one routed prompt really skipped, and what that costs with a continuation after it."""

    def __init__(self, model=None, pruner=None, row: Trace | None = None, costs: Sequence[BlockCost] = ()):
        self.sparsity = 0.0
        self._pruner, self._model, self._costs = pruner, model, costs
        self._row: Any = row
        if row is not None:
            self.sparsity = row.row_sparsity.item()

    def flops_cut(self, new_tokens: int) -> float:
        """Share of the FLOPs saved on the prompt and `new_tokens` tokens fed after it, all of them computed."""
        if self._row is None or self.sparsity == 0.0:
            return 0.0
        tokens, head = int(self._row.real.sum()), head_flops(self._model)
        dense, pruned = self._prompt
        after = [continuation_flops(self._costs, tokens, new_tokens, held, head) for held in self._stored(tokens)]
        return 1.0 - (pruned + after[1]) / (dense + after[0])

    @cached_property
    def _prompt(self) -> tuple[float, float]:
        return realised_flops(self._model, self._row, self._pruner.kv, costs=self._costs)

    def _stored(self, tokens: int) -> tuple[list[int], list[int]]:
        """Entries in the cache of each block, dense and pruned."""
        keyed = self._row.keep_attention or self._row.keep
        modes = zip(keyed, self._pruner.kv, strict=True)
        return [tokens] * len(keyed), [tokens if mode == "keep" else int(mask.sum()) for mask, mode in modes]


def realised_rows(model, pruner, rows: int) -> list[Realised]:
    """One per row of the prompt that was routed last; of a dense model nothing was skipped."""
    if pruner is None:
        return [Realised()] * rows
    trace = pruner.trace.routed
    masks = [[mask.cpu() for mask in part] for part in (trace.keep, trace.keep_attention, trace.keep_mlp)]
    real, costs = trace.real.cpu(), block_costs(model, pruner.skip_rank)
    return [Realised(model, pruner, _row(masks, real, row), costs) for row in range(rows)]


def _row(masks: Sequence[Sequence], real, row: int) -> Trace:
    """The trace of one row. Parts that share one mask go on sharing it: `realised_flops` counts by that."""
    place = slice(row, row + 1)
    cut: dict[int, Any] = {}
    keep, attention, mlp = ([cut.setdefault(id(mask), mask[place]) for mask in part] if part else [] for part in masks)
    return Trace(keep=keep, keep_attention=attention, keep_mlp=mlp, real=real[place])
