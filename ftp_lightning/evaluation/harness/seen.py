"""Documents of a task that a search has looked at: a schedule is selected on them, so that no score may count them.

A document has a place in [0, 1) by the hash of its content, which another order of the rows does not move. A search
looks at the documents of lowest place; its schedule carries how far it looked, `Schedule.seen`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from ftp_lightning.errors import UserError

SEARCHED = 0.5
"""Searches look at documents below this place, so that about half of a task is left to evaluate on."""


def place(document: Mapping[str, Any]) -> float:
    """Where a document stands in [0, 1), by the sha256 of its content."""
    content = json.dumps(document, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64


def furthest(seen: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Task -> the last place that any of several searches has looked at."""
    found: dict[str, float] = {}
    for one in seen:
        found |= {task: max(last, found.get(task, 0.0)) for task, last in one.items()}
    return found


def leave_out(name: str, task: Any, seen: Mapping[str, float]) -> int:
    """Take the documents that were seen out of an lm-eval task. Returns how many.

    UserError where none is left.
    """
    if name not in seen:
        return 0
    documents = task.eval_docs
    left = [number for number, document in enumerate(documents) if place(document) > seen[name]]
    if not left:
        raise UserError(f"the search has looked at all documents of {name}\nGive more data, or another task.")
    kept = documents.select(left) if hasattr(documents, "select") else [documents[number] for number in left]
    setattr(task, "test_docs" if task.has_test_docs() else "validation_docs", lambda: kept)
    return len(documents) - len(left)


def warn_of_seen(requests: Iterable[Any], seen: Mapping[str, float], told: set[str]) -> None:
    """Warn of lm-eval's requests about documents that were seen, once per task; `told` holds those already told.

    A model has to answer every request that lm-eval makes, so it cannot leave documents out itself.
    """
    asked: dict[str, dict[Any, Any]] = {}
    for request in requests:
        task = str(getattr(request, "task_name", None))
        if task in seen and task not in told:
            asked.setdefault(task, {})[request.doc_id] = request.doc
    for task, documents in asked.items():
        told.add(task)
        if count := sum(place(document) <= seen[task] for document in documents.values()):
            warnings.warn(
                f"{task}: {count} of {len(documents)} documents were used to select the schedule, so the score is too "
                "high. `ftp-lightning evaluate` leaves them out.",
                stacklevel=3,
            )
