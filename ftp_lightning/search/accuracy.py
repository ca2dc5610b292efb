"""Task accuracy as the search's loss: the paper's own fitness (WinoGrande, Section 4.2), on one half of the task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.harness.seen import SEARCHED, furthest, place
from ftp_lightning.models import model_identity
from ftp_lightning.pruning.devices import home
from ftp_lightning.pruning.pruner import TokenPruner
from ftp_lightning.schedule import Schedule
from ftp_lightning.search.fitness import MemoFitness, pruner_identity


@dataclass(frozen=True)
class Item:
    """One document of an lm-eval task and the requests it makes of a model (one per choice)."""

    task: Any
    document: dict
    requests: tuple[Any, ...]

    def right(self, answers: Sequence[tuple[float, bool]]) -> float:
        """lm-eval's own accuracy of this document, 0 or 1, from (log-probability, greedy) per request."""
        return float(self.task.process_results(self.document, list(answers))["acc"])


def task_items(name: str, file: str | Path | dict[str, Path] | None, limit: int | None = None) -> list[Item]:
    """The first `limit` documents, by `seen.place`, of a multiple-choice task that searches may look at.

    `evaluate` leaves these out. file: JSONL in the Hub's schema, None for the Hub.
    UserError for an unknown task, or one that has no accuracy.
    """
    from ftp_lightning.evaluation.harness.tasks import load_tasks

    items: list[Item] = []
    for task in load_tasks({name: file}):
        if task.OUTPUT_TYPE != "multiple_choice":
            raise UserError(f"task {name} has no choices: {task.OUTPUT_TYPE}\nSearch with a multiple-choice task.")
        task.build_all_requests()
        requests: dict[int, list[Any]] = {}
        for request in task.instances:
            requests.setdefault(request.doc_id, []).append(request)
        for made in requests.values():
            if place(made[0].doc) < SEARCHED:
                items.append(Item(task, made[0].doc, tuple(made)))
    if not items:
        raise UserError(f"task {name} has no documents in the half that searches look at\nGive more data.")
    return sorted(items, key=lambda item: place(item.document))[:limit]


def seen_by(items: Sequence[Item]) -> dict[str, float]:
    """Task -> the last place that a search on these items looks at, as `Schedule.seen` keeps it."""
    return furthest({item.task.config.task: place(item.document)} for item in items)


class TaskAccuracy(MemoFitness):
    """1 - accuracy of multiple-choice items, scored as lm-eval's `ftp` does: context routed, choices through its cache.

    A coarse loss: n items know n + 1 values, so that many schedules tie.

    Args:
        model, tokenizer: a Hugging Face causal LM with nothing attached.
        items: from `task_items`.
        make_pruner: Schedule -> TokenPruner.
        chunk: items per measurement. batch_size: texts per forward.
    """

    def __init__(
        self,
        model,
        tokenizer,
        items: Sequence[Item],
        make_pruner: Callable[[Schedule], TokenPruner],
        chunk: int = 32,
        batch_size: int = 8,
        memo: bool = True,
    ):
        from ftp_lightning.evaluation.harness.model import FtpLM

        self._chunks = [items[start : start + chunk] for start in range(0, len(items), chunk)]
        super().__init__([len(part) for part in self._chunks], memo)
        self.model, self.make_pruner = model, make_pruner
        device, dtype = str(home(model)), model.dtype
        self._lm = FtpLM(model, tokenizer=tokenizer, device=device, dtype=dtype, batch_size=batch_size)
        self._cost = [sum(map(self._tokens, part)) for part in self._chunks]

    def measure(self, schedule: Schedule, chunk: int) -> float:
        items = self._chunks[chunk]
        requests = [request for item in items for request in item.requests]
        with self.make_pruner(schedule)(self.model):
            answers = iter(self._lm.loglikelihood(requests, disable_tqdm=True))
        self._lm.accounts.clear()
        right = [item.right([next(answers) for _ in item.requests]) for item in items]
        return 1.0 - sum(right) / len(right)

    def cost(self, schedule: Schedule, chunk: int) -> int:
        """Tokens of contexts, each distinct one once, and choices."""
        return self._cost[chunk]

    def identity(self) -> dict[str, Any]:
        content = json.dumps([item.document for part in self._chunks for item in part], sort_keys=True, default=str)
        return super().identity() | {
            "items": hashlib.sha256(content.encode()).hexdigest()[:16],
            "model": model_identity(self.model),
            "pruner": pruner_identity(self.model, self.make_pruner),
        }

    def _tokens(self, item: Item) -> int:
        contexts = {request.args[0] for request in item.requests}
        choices = [request.args[1] for request in item.requests]
        return sum(len(self._lm.tok_encode(text)) for text in [*contexts, *choices])
