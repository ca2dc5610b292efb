"""What an evaluation says of one task: plain values for results.json, from the summaries of `run_tasks`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ftp_lightning.data.choices import distance_bucket
from ftp_lightning.evaluation import statistics

Results = dict[str, dict]
"""Task -> summary, as `evaluation.tasks.run_tasks` gives it."""


def dense_cell(summary: dict) -> dict[str, Any]:
    """Score of the dense model under its declared metric, `acc` whatever that is; chance, items, prompt lengths."""
    low, high = _interval(summary)
    names = ("metric", "stderr", "chance", "n", "prompt_tokens", "truncated", "left_out", "metrics")
    return {"acc": summary["score"], "low": low, "high": high} | {name: summary[name] for name in names}


def task_cell(task: str, dense: Results, found: Results) -> dict[str, Any]:
    """Score, its standard error and interval, skill, answers kept, and whether it measures anything: `measures` where
    dense is not `near_chance` and the prompts were long enough to be pruned, `exercised` (method.md, section 8)."""
    summary, ours = found[task], dense_cell(found[task])
    skill, known = _skill(dense[task], summary)
    exercised = (summary["exercised"] or 0.0) >= 0.5
    names = ("sparsity", "skipped", "flops_cut")
    return ours | {name: summary[name] for name in names} | {
        "skill": skill,
        "skill_interval": None if skill is None else _ratio(task, [(summary, dense[task])], above_chance=True),
        "kept": kept_cell(task, dense, found),
        "measures": skill is not None and exercised,
        "near_chance": known and skill is None,
        "exercised": exercised,
    }  # fmt: skip


def _skill(dense: dict, pruned: dict) -> tuple[float | None, bool]:
    """Skill, and whether all that it needs is known."""
    needed = (pruned["score"], dense["score"], dense["chance"], dense["stderr"])
    known = None not in needed
    return (statistics.skill(*needed) if known else None), known


def kept_cell(task: str, dense: Results, found: Results) -> dict[str, Any] | None:
    """Answers kept of those that need the passage, in all and by how far back the fact lies; None for a task that has
    no twin without facts, or where dense answers nothing that needs it."""
    if task not in found or f"{task}_deleted" not in dense:
        return None
    rows = dense[task]["items"], dense[f"{task}_deleted"]["items"], found[task]["items"]
    right = [[item["right"] for item in items] for items in rows]
    buckets = [distance_bucket(item["distance"]) for item in rows[0]]
    total = asdict(statistics.kept(*right))
    groups = statistics.kept_by(buckets, *right)
    near_first = sorted((bucket for bucket in groups if groups[bucket].items), key=lambda b: int(str(b).split("-")[0]))
    names = ("share", "low", "high", "items")
    by_distance = {bucket: {name: getattr(groups[bucket], name) for name in names} for bucket in near_first}
    return total | {"by_distance": by_distance} if total["items"] else None


def leak_cell(task: str, prompt: dict, sequence: dict) -> dict[str, Any] | None:
    """The score of mode "sequence", and its paired difference to mode "prompt" on the same items."""
    from ftp_lightning.evaluation.pairing import compare

    rows = [
        {
            "task": task,
            "id": one["id"],
            "document": one["document"],
            "score": {"sequence": two["score"], "prompt": one["score"]},
            "right": {"sequence": two["right"], "prompt": one["right"]},
        }
        for one, two in zip(prompt["items"], sequence["items"], strict=True)
    ]
    pairs = compare(rows, "sequence", "prompt")
    if not pairs:
        return None
    names = ("difference", "low", "high", "lost", "gained", "p")
    return {"acc": sequence["score"], "stderr": sequence["stderr"]} | {name: getattr(pairs[0], name) for name in names}


def counted_tasks(records: Sequence[dict[str, Any]], tasks: Sequence[str]) -> list[str]:
    """Those asked for by name (a group counts once, not its members again) that measure something in every method."""
    return [task for task in tasks if all(record["tasks"].get(task, {}).get("measures") for record in records)]


def with_retention(
    records: list[dict[str, Any]], tasks: Sequence[str], dense: Results, found: dict[str, Results] | None = None
) -> list[dict[str, Any]]:
    """The records with the paper's retention, over one and the same tasks for all methods; None where there are none.

    found: method -> summaries, for the 95 % interval; without it there is none.
    """
    counted = counted_tasks(records, tasks)
    for record in records:
        accuracies = [record["tasks"][task]["acc"] for task in counted], [dense[task]["score"] for task in counted]
        record["retention"] = statistics.retention(*accuracies) if counted else None
        ends = None
        if counted and found is not None:
            ends = _ratio("retention", [(found[record["name"]][task], dense[task]) for task in counted])
        record["retention_interval"] = ends and [100 * end for end in ends]
    return records


def _ratio(seed: str, pairs: Sequence[tuple[dict, dict]], above_chance: bool = False) -> list[float] | None:
    tasks = [(_scores(pruned), _scores(dense), dense["chance"] if above_chance else 0.0) for pruned, dense in pairs]
    ends = statistics.ratio_interval(tasks, random.Random(seed))
    return ends and list(ends)


def _interval(summary: dict) -> tuple[float | None, float | None]:
    return (None, None) if summary["score"] is None else statistics.score_interval(_scores(summary))


def _scores(summary: dict) -> list[float]:
    return [item["score"] for item in summary["items"]]
