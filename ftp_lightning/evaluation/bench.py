"""One bench: the dense model on rows of text and on tasks, and every method measured beside it in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from ftp_lightning.data.rows import Rows
from ftp_lightning.evaluation import continuation
from ftp_lightning.evaluation.record import DENSE, joined, record, with_need
from ftp_lightning.evaluation.scores import ContinuationScores

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import Tensor

    from ftp_lightning.pruning import TokenPruner

TEXT, OWN_ANSWERS, DELETED = "text", "own_answers", "_deleted"
"""Names of the tasks that are rows of text; the end of the name of a task's twin without its passages."""
TEACHER_BYTES = 1 << 30
"""Dense log-probabilities up to this size are kept for all methods; beyond it the dense model runs along [ours]."""


class Ask(Protocol):
    """Asks all tasks of the model as it is, under a pruner or, where it is None, dense."""

    def __call__(self, pruner: TokenPruner | None, mode: str) -> DataFrame:
        """The items of all tasks as a record without method and seed; dense also those of NAME_deleted."""
        ...


@dataclass
class Bench:
    """Measures methods on the same rows and the same tasks, so that all differences are paired.

    Attributes:
        model: in eval mode, nothing attached.
        texts: rows of text by the name of their task. Of `OWN_ANSWERS` the continuations are the dense model's own.
        ask: the tasks, see `harness.asking.HarnessTasks` and `greedy.Questions`; None where there are none.
        batch_size: rows per forward.
        scores: (method, text, mode) -> what `continuation.evaluate_rows` found, filled by `score`.
        metrics: method -> task -> lm-eval's own numbers, filled by `measure`.
    """

    model: Any
    texts: Mapping[str, Rows]
    ask: Ask | None = None
    batch_size: int = 8
    scores: dict[tuple[str, str, str], ContinuationScores] = field(default_factory=dict)
    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    @cached_property
    def dense(self) -> DataFrame:
        """The dense model's own record: its answers to the tasks, and to their twins without passages."""
        answers = {name: [{"right": True, "document": one} for one in rows.documents] for name, rows in self._own()}
        parts = [record(items, DENSE, name) for name, items in answers.items()]
        return joined([*parts, self.asked(DENSE, None)])

    @cached_property
    def teachers(self) -> dict[str, list[Tensor] | None]:
        """The dense model's log-probabilities of each text, where they fit into memory."""
        return {name: self._teacher(rows) for name, rows in self.texts.items()}

    def noise_floor(self, text: str = TEXT) -> ContinuationScores:
        """What rounding alone moves on a text: the floor under every KL."""
        return continuation.noise_floor(self.model, self.texts[text], self.batch_size, self.teachers[text])

    def measure(
        self, name: str, pruner: TokenPruner, seed: int = 0, mode: str = "prompt", scored: bool = False
    ) -> DataFrame:
        """The record of one method on everything. `mode`: "prompt", or "sequence" as in the paper. `scored`: `scores`
        holds what this very method loses on the texts."""
        found = (
            {text: self.scores[name, text, mode] for text in self.texts}
            if scored
            else {text: self.score(name, pruner, text, mode) for text in self.texts}
        )
        parts = [record(one.items(), name, text, seed) for text, one in found.items()]
        return self.needed(joined([*parts, self.asked(name, pruner, seed, mode)]))

    def asked(self, name: str, pruner: TokenPruner | None, seed: int = 0, mode: str = "prompt") -> DataFrame:
        """The answers of one method to all tasks, without the column `needed`."""
        if self.ask is None:
            return joined([])
        found = self.ask(pruner, mode).assign(method=name, seed=seed)
        self.metrics[name] = getattr(self.ask, "metrics", {})
        return found

    def needed(self, items: DataFrame) -> DataFrame:
        """A record with the column `needed`, by the dense model's answers."""
        twins = self.dense["task"].map(lambda task: task.endswith(DELETED)).astype(bool)
        without = self.dense[twins].assign(task=self.dense[twins]["task"].map(lambda task: task.removesuffix(DELETED)))
        return with_need(items, self.dense[~twins], without)

    def score(self, name: str, pruner: TokenPruner, text: str = TEXT, mode: str = "prompt") -> ContinuationScores:
        """What a method loses on one text."""
        about = (pruner, mode, self.batch_size, self.teachers[text])
        found = continuation.evaluate_rows(self.model, self.texts[text], *about)
        self.scores[name, text, mode] = found
        return found

    def _own(self) -> list[tuple[str, Rows]]:
        return [(name, rows) for name, rows in self.texts.items() if name == OWN_ANSWERS]

    def _teacher(self, rows: Rows) -> list[Tensor] | None:
        size = 4 * sum(tokens for _, tokens in rows.shapes) * self.model.config.get_text_config().vocab_size
        return continuation.teacher_logprobs(self.model, rows, self.batch_size) if size <= TEACHER_BYTES else None
