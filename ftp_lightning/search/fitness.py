"""What the search minimises: a loss of a schedule on chunks of rows, each remembered once it is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ftp_lightning.data.rows import Batch, Rows, moved, scored_tokens
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.continuation import continuation_logits, row_means
from ftp_lightning.models import model_identity
from ftp_lightning.pruning.devices import home
from ftp_lightning.pruning.family import find_blocks
from ftp_lightning.pruning.pruner import TokenPruner
from ftp_lightning.schedule import Schedule, first_routed
from ftp_lightning.search.criteria import Criterion, KLDivergence, entering_head
from ftp_lightning.training.resume import BlockStates, capture, first_needed_block, resume_from

STATES_LIMIT = 256 << 20
"""Bytes of the dense model's hidden states that are kept, so that dense first blocks are computed once [ours]."""


class MemoFitness:
    """A deterministic loss of a schedule on chunks of rows, each measured at most once.

    A chunk is the same few rows in the same forward, always: its loss depends on nothing but the schedule, so that
    processes, interruptions and neighbours in a population change no digit.

    Subclasses define `measure(schedule, chunk)` and `cost(schedule, chunk)`. The state (memo and counters) is
    JSON-able, so that a resumed search counts and remembers as an uninterrupted one.

    Args:
        sizes: how many rows each chunk holds.
        memo: False measures everything anew, as searches without a memo do (for comparison).

    Attributes:
        evaluations, memo_hits: (schedule, chunk) that were measured, that were remembered.
        forward_tokens: tokens pushed through the model so far, in this process and those it works with.
    """

    def __init__(self, sizes: Sequence[int], memo: bool = True):
        if not sizes or min(sizes) < 1:
            raise ValueError(f"a fitness needs chunks of at least one row, got {list(sizes)}")
        self.sizes, self.remembers = tuple(sizes), memo
        self.evaluations = self.memo_hits = self.forward_tokens = 0
        self._memo: dict[str, float] = {}

    def measure(self, schedule: Schedule, chunk: int) -> float:
        """Mean loss over the rows of a chunk. Touches no state: other processes may measure other chunks."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it measures a schedule")

    def cost(self, schedule: Schedule, chunk: int) -> int:
        """Tokens that `measure` pushes through the model."""
        raise NotImplementedError(f"{type(self).__name__} does not say what a measurement costs")

    def identity(self) -> dict[str, Any]:
        """JSON-able: what else must be equal for equal losses (rows, router, ...)."""
        return {"sizes": list(self.sizes)}

    def __call__(self, schedule: Schedule, chunks: Sequence[int] | None = None) -> float:
        """The mean loss on the rows of `chunks` (default: all)."""
        return self.scores([schedule], chunks)[0]

    def scores(
        self,
        schedules: Sequence[Schedule],
        chunks: Sequence[int] | None = None,
        map_function: Callable[[Callable, list], Iterable[float]] = map,
    ) -> list[float]:
        """Mean losses on the rows of `chunks` (default: all); what is not known yet is measured through
        `map_function`, which may spread it over processes. UserError where a loss is not finite: it has no rank."""
        chunks = range(len(self.sizes)) if chunks is None else chunks
        asked = [(schedule, chunk) for schedule in schedules for chunk in chunks]
        known = self._memo if self.remembers else {}
        wanted = {_key(*task): task for task in asked if _key(*task) not in known}
        values = dict(zip(wanted, map_function(self._measure_task, list(wanted.values()))))
        for key, (schedule, chunk) in wanted.items():
            if not math.isfinite(values[key]):
                raise UserError(f"the loss of {schedule} is {values[key]}\nGive another --dtype, or check the model.")
            self.forward_tokens += self.cost(schedule, chunk)
        self.evaluations += len(wanted)
        self.memo_hits += len(asked) - len(wanted)
        if self.remembers:
            self._memo.update(values)
        found, rows = known | values, sum(self.sizes[chunk] for chunk in chunks)
        return [
            math.fsum(self.sizes[chunk] * found[_key(schedule, chunk)] for chunk in chunks) / rows
            for schedule in schedules
        ]

    def known(self, schedule: Schedule) -> dict[int, float]:
        """Chunk -> loss, of the chunks that are remembered."""
        found = {chunk: self._memo.get(_key(schedule, chunk)) for chunk in range(len(self.sizes))}
        return {chunk: loss for chunk, loss in found.items() if loss is not None}

    def _measure_task(self, task: tuple[Schedule, int]) -> float:
        return self.measure(*task)

    def state_dict(self) -> dict:
        names = ("evaluations", "memo_hits", "forward_tokens")
        return {"memo": dict(self._memo), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict) -> None:
        self._memo = dict(state["memo"])
        self.evaluations, self.memo_hits = state["evaluations"], state["memo_hits"]
        self.forward_tokens = state["forward_tokens"]


class ContinuationFitness(MemoFitness):
    """A criterion (KL by default) of the continuation in the deployed computation [ours: method.md, section 8].

    What the criterion needs of the dense model is computed once, here, and lies on the CPU. A schedule whose first
    blocks are dense starts at the first that is not, from hidden states of the dense model that are kept as far as
    `STATES_LIMIT` goes; `forward_tokens` counts the blocks that ran. The model must have nothing attached and be in
    eval mode.

    Args:
        model: a Hugging Face causal LM.
        rows: prompts and continuations of any length; every row weighs alike.
        make_pruner: Schedule -> TokenPruner, put in force as `with make_pruner(schedule)(model)`.
        chunk: rows per forward, in their own order; part of the result's last digits, hence of what must be equal to
            reproduce it.
        criterion: what is lost; `criteria.KLDivergence()` by default.
        memo: see `MemoFitness`.
        share_prefix: False computes dense first blocks again each time (for comparison).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: Rows,
        make_pruner: Callable[[Schedule], TokenPruner],
        chunk: int = 8,
        criterion: Criterion | None = None,
        memo: bool = True,
        share_prefix: bool = True,
    ):
        chunks = [range(start, min(start + chunk, len(rows))) for start in range(0, len(rows), chunk)]
        super().__init__([len(numbers) for numbers in chunks], memo)
        self.model, self.rows, self.make_pruner = model, rows, make_pruner
        self.criterion = criterion or KLDivergence()
        self._batches = [rows.batch(numbers) for numbers in chunks]
        self._tokens = [sum(sum(rows.shapes[row]) for row in numbers) for numbers in chunks]
        self._boundaries = self._affordable() if share_prefix else []
        self._states: list[dict[int, Tensor]] = []
        self._teacher = [self._observe(chunk) for chunk in range(len(chunks))]

    @torch.no_grad()
    def measure(self, schedule: Schedule, chunk: int) -> float:
        pruner, batch, start = self.make_pruner(schedule), self._batch(chunk), self._start(schedule)
        with resume_from(self.model, start, self._dense_states(chunk, start)), pruner(self.model):
            logits, hidden = self._forward(batch)
        teacher = {name: kept.to(logits.device) for name, kept in self._teacher[chunk].items()}
        losses = self.criterion.loss(teacher, logits, hidden, batch["input_ids"][:, batch["prompt_tokens"] :])
        return row_means(losses, scored_tokens(batch)).double().mean().item()

    def cost(self, schedule: Schedule, chunk: int) -> int:
        """Real tokens of the chunk times the share of the blocks that run, (N - first) / N, rounded."""
        return round(self._tokens[chunk] * (1 - self._start(schedule) / schedule.num_blocks))

    def identity(self) -> dict[str, Any]:
        return super().identity() | {
            "rows": self.rows.hash(),
            "criterion": repr(self.criterion),
            "model": model_identity(self.model),
            "pruner": pruner_identity(self.model, self.make_pruner),
        }

    @torch.no_grad()
    def _observe(self, chunk: int) -> dict[str, Tensor]:
        """What the criterion wants to know of the dense model; on the way its hidden states, as far as they fit."""
        with capture(self.model) as states:
            logits, hidden = self._forward(self._batch(chunk))
        self._states.append({block: states.entering(block).cpu() for block in self._boundaries})
        self.forward_tokens += self._tokens[chunk]
        return {name: kept.cpu() for name, kept in self.criterion.remember(logits, hidden).items()}

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, C, V) and the states that gave them (B, C, D)."""
        with entering_head(self.model) as seen:
            logits = continuation_logits(self.model, **batch)
        return logits, torch.cat(seen, 1).to(logits.device)

    def _batch(self, chunk: int) -> Batch:
        return moved(self._batches[chunk], home(self.model))

    # ---------------------------------------------------------------- dense first blocks, computed once

    def _affordable(self) -> list[int]:
        """Blocks in front of which states are kept: all but the first, or evenly spread ones within STATES_LIMIT."""
        blocks, numbers = len(find_blocks(self.model)), sum(batch["input_ids"].numel() for batch in self._batches)
        size = numbers * self.model.config.get_text_config().hidden_size * self.model.dtype.itemsize
        count = min(blocks - 1, STATES_LIMIT // size)
        return sorted({round(blocks * (place + 1) / (count + 1)) for place in range(count)})

    def _start(self, schedule: Schedule) -> int:
        """The first block that runs: no later than a router needs, and one whose input is kept."""
        routed = first_routed(schedule.sparsity)
        pruner = self.make_pruner(schedule)
        first = schedule.num_blocks - 1 if routed is None else routed
        needed = first_needed_block(self.model, first, pruner.router.needs, pruner.reads_from)
        return max((block for block in self._boundaries if block <= needed), default=0)

    def _dense_states(self, chunk: int, block: int) -> BlockStates:
        if block == 0:
            return BlockStates()
        passes: list[list[Tensor]] = [[] for _ in range(block)]
        return BlockStates([*passes, [self._states[chunk][block].to(home(self.model))]])


def pruner_identity(model: torch.nn.Module, make_pruner: Callable[[Schedule], TokenPruner]) -> dict[str, Any]:
    """`TokenPruner.identity` of what a search measures with, under no schedule of its own."""
    return make_pruner(Schedule.uniform(len(find_blocks(model)), 0.0)).identity()


def _key(schedule: Schedule, chunk: int) -> str:
    return f"{schedule.key()}:{chunk}"
