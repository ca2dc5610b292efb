"""Two methods on the same items, item by item: what was lost and gained, and whether it can be told from chance.

A row is one item as `samples.jsonl` holds it: task, subject, id, hash, document, and per method `score` and `right`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.statistics import mcnemar_p, paired

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """A against B on the `items` of one task, from `clusters` documents.

    `difference`: mean score of A minus B with its 95 % interval, None where there is one document. `lost`: right in B
    only; `gained`: right in A only; `p`: McNemar's on the two."""

    task: str
    a: str
    b: str
    items: int
    clusters: int
    difference: float
    low: float | None
    high: float | None
    lost: int
    gained: int
    p: float


def compare(rows: Sequence[Row], a: str, b: str) -> list[Pair]:
    """Per task A against B, over the items that both have scored; tasks without scores are left out."""
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        if row["score"].get(a) is not None and row["score"].get(b) is not None:
            tasks.setdefault(row["task"], []).append(row)
    return [_pair(task, a, b, items) for task, items in tasks.items()]


def _pair(task: str, a: str, b: str, items: Sequence[Row]) -> Pair:
    scores = [[float(row["score"][name]) for row in items] for name in (a, b)]
    found = paired(scores[0], scores[1], [document_of(row) for row in items])
    assert found.value is not None
    right = [(bool(row["right"][a]), bool(row["right"][b])) for row in items]
    lost, gained = right.count((False, True)), right.count((True, False))
    ends = found.low, found.high
    return Pair(task, a, b, found.items, found.clusters, found.value, *ends, lost, gained, mcnemar_p(lost, gained))


def document_of(row: Row) -> tuple[Any, ...]:
    """Whose item it is: its document, else the item itself. Both are numbered anew in every subject of a group."""
    subject, document = row.get("subject", row.get("task")), row.get("document")
    return (subject, "item", row["id"]) if document is None else (subject, "document", str(document))


def pairs_of(rows: Sequence[Row], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Every method against dense, and the last one against every other: the claims that a table makes."""
    wanted = [(name, "dense") for name in methods] + [(methods[-1], name) for name in methods[:-1]]
    return [asdict(pair) for a, b in wanted for pair in compare(rows, a, b)]


# ---------------------------------------------------------------- two runs


def read_samples(run: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's samples.jsonl; `run`: that file, or a folder that holds it. UserError where it cannot be
    read."""
    path = Path(run).expanduser()
    path = next((p for p in (path / "samples.jsonl", path / "evaluate" / "samples.jsonl") if p.is_file()), path)
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        [(row["task"], row["hash"], row["score"], row["right"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{run} holds no samples.jsonl that can be compared\nMake one with `evaluate`.") from None
    return rows


def methods_in(rows: Iterable[Row]) -> list[str]:
    """Names of the methods that scored any item, in order."""
    return list(dict.fromkeys(name for row in rows for name, score in row["score"].items() if score is not None))


def joined(first: Sequence[Row], second: Sequence[Row], a: str, b: str) -> tuple[list[dict[str, Any]], int]:
    """Rows of the items that both runs asked in the very same words (by `hash`), method `a` of the first run as "A" and
    `b` of the second as "B"; and how many of either run have no such partner."""
    others: dict[tuple, list[Row]] = {}
    for row in second:
        others.setdefault((row["task"], row["hash"]), []).append(row)
    rows, alone = [], 0
    for row in first:
        partners = others.get((row["task"], row["hash"]))
        if not partners:
            alone += 1
            continue
        other = partners.pop(0)
        both = {key: {"A": row[key].get(a), "B": other[key].get(b)} for key in ("score", "right")}
        rows.append({**row, **both})
    return rows, alone + sum(map(len, others.values()))
