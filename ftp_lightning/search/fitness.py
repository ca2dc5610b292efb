"""What the search minimises: the mean KL(dense || pruned) per continuation token, remembered once measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ftp_lightning.data.windows import Windows
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.continuation import continuation_logits, kl_per_token
from ftp_lightning.pruning.pruner import TokenPruner
from ftp_lightning.schedule import Schedule

FLOAT32_LIMIT = 2 << 30  # bytes of teacher log-probabilities up to which they are kept in float32


class MemoFitness:
    """A deterministic loss of a schedule on some of `kinds` windows, measured at most once.

    Subclasses define `measure(schedule, indices) -> float`. The state (memo and counters) is JSON-able, so that a
    resumed search counts and remembers as an uninterrupted one.

    Attributes:
        kinds: the kind of each window ("plain" or "recall").
        evaluations, memo_hits: calls that were measured, calls that were remembered.
        forward_tokens: tokens of the windows pushed through the model so far.
    """

    def __init__(self, kinds: Sequence[str]):
        if not kinds:
            raise ValueError("a fitness needs at least one window")
        self.kinds = list(kinds)
        self.evaluations = self.memo_hits = self.forward_tokens = 0
        self._memo: dict[str, float] = {}

    def measure(self, schedule: Schedule, indices: tuple[int, ...]) -> float:
        raise NotImplementedError(f"{type(self).__name__} does not say how it measures a schedule")

    def __call__(self, schedule: Schedule, indices: Sequence[int] | None = None) -> float:
        """The loss on the windows `indices` (default: all). UserError where it is not finite: it has no rank."""
        rows = tuple(range(len(self.kinds))) if indices is None else tuple(indices)
        key = f"{schedule.key()}:{','.join(map(str, rows))}"
        if key in self._memo:
            self.memo_hits += 1
            return self._memo[key]
        value = self.measure(schedule, rows)
        if not math.isfinite(value):
            raise UserError(f"the loss of {schedule} is {value}\nGive another --dtype, or check the model.")
        self.evaluations += 1
        self._memo[key] = value
        return value

    def state_dict(self) -> dict:
        names = ("evaluations", "memo_hits", "forward_tokens")
        return {"memo": dict(self._memo), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict) -> None:
        self._memo = dict(state["memo"])
        self.evaluations, self.memo_hits = state["evaluations"], state["memo_hits"]
        self.forward_tokens = state["forward_tokens"]


class ContinuationFitness(MemoFitness):
    """Mean KL(dense || pruned), nats per continuation token, in the deployed computation [ours: method.md, section 8].

    The dense log-probabilities (n, C, V) are computed once, here, and lie on the CPU: float32 up to 2 GiB, beyond
    that float16, normalised again when read. The model must have nothing attached and be in eval mode.

    Args:
        model: a Hugging Face causal LM.
        windows: rows of P prompt and C continuation tokens.
        make_pruner: Schedule -> TokenPruner, put in force as `with make_pruner(schedule)(model)`.
        batch_size: windows per forward; part of the result's last digits, hence of what must be equal to reproduce it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        windows: Windows,
        make_pruner: Callable[[Schedule], TokenPruner],
        batch_size: int = 8,
    ):
        super().__init__(windows.kinds)
        self.model, self.windows, self.make_pruner, self.batch_size = model, windows, make_pruner, batch_size
        self.teacher = self._dense_logprobs()

    @torch.no_grad()
    def measure(self, schedule: Schedule, indices: tuple[int, ...]) -> float:
        pruner, rows_kl = self.make_pruner(schedule), []
        with pruner(self.model):
            for rows in self._batches(indices):
                logits = self._logits(rows)
                rows_kl.append(kl_per_token(self._teacher(rows, logits), logits).double().mean(dim=1).cpu())
        return torch.cat(rows_kl).mean().item()

    def _dense_logprobs(self) -> Tensor:
        first, *others = self._batches(range(len(self.windows)))
        with torch.no_grad():
            logits = self._logits(first)
            size = len(self.windows) * logits[0].numel() * 4
            dtype = torch.float16 if size > FLOAT32_LIMIT else logits.dtype
            parts = [logits.log_softmax(-1).to("cpu", dtype)]
            parts += [self._logits(rows).log_softmax(-1).to("cpu", dtype) for rows in others]
        return torch.cat(parts)

    def _teacher(self, rows: list[int], logits: Tensor) -> Tensor:
        teacher = self.teacher[rows].to(logits.device, logits.dtype)
        return teacher.log_softmax(-1) if self.teacher.dtype == torch.float16 else teacher

    def _logits(self, rows: list[int]) -> Tensor:
        ids = self.windows.input_ids[rows].to(self.model.device)
        self.forward_tokens += ids.numel()
        return continuation_logits(self.model, ids, self.windows.prompt_tokens)

    def _batches(self, indices: Sequence[int]) -> Iterator[list[int]]:
        for start in range(0, len(indices), self.batch_size):
            yield list(indices[start : start + self.batch_size])
