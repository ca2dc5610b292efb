"""What results.json says of one method on one task: plain values, all of them made from the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ftp_lightning.data.choices import distance_bucket
from ftp_lightning.evaluation import statistics
from ftp_lightning.evaluation.record import documents, flops_cut, kept, mean, outcomes
from ftp_lightning.evaluation.statistics import Interval, mcnemar_p

if TYPE_CHECKING:
    from pandas import DataFrame

Metrics = Mapping[str, float]
"""lm-eval's own numbers of a task, under their plain names."""


def dense_cell(items: DataFrame, metrics: Metrics) -> dict[str, Any]:
    """The score under the task's declared metric (`acc`, whatever that is), its interval, chance and prompt lengths."""
    found = mean(items, "score") if scored(items) else Interval(None, None, None, len(items), 0)
    return {
        "acc": found.value,
        "low": found.low,
        "high": found.high,
        "metric": items["metric"].iloc[0],
        "stderr": standard_error(items) if scored(items) else None,
        "chance": chance(items),
        "n": len(items),
        "prompt_tokens": average(items, "prompt_tokens"),
        "truncated": int((items["truncated"].fillna(0) > 0).sum()) if "truncated" in items else 0,
        "metrics": dict(metrics),
    }


def task_cell(items: DataFrame, dense: DataFrame, metrics: Metrics, has_twin: bool) -> dict[str, Any]:
    """The same of a pruned model, with skill, answers kept, and whether the task measures anything.

    A task `measures` where dense is not `near_chance` and where the prompts were long enough to be pruned, `exercised`
    (method.md, section 8). `has_twin`: whether the task was also asked without its passages.
    """
    base, share = dense_cell(dense, {}), average(items, "exercised")
    needed = (average(items, "score"), base["acc"], base["chance"], base["stderr"])
    known = None not in needed
    skill = statistics.skill(*needed) if known else None  # type: ignore[arg-type]
    exercised = (share or 0.0) >= 0.5
    return dense_cell(items, metrics) | {
        "sparsity": average(items, "sparsity"),
        "skipped": average(items, "skipped"),
        "flops_cut": flops_cut(items),
        "skill": skill,
        "skill_interval": None if skill is None else _ends([(items, dense, base["chance"])]),
        "kept": kept_cell(items) if has_twin else None,
        "measures": skill is not None and exercised,
        "near_chance": known and skill is None,
        "exercised": exercised,
    }


def kept_cell(items: DataFrame | None) -> dict[str, Any] | None:
    """Answers kept of those that are needed, in all and by how far back the fact lies; None where none is needed."""
    if items is None or "needed" not in items or not items["needed"].any():
        return None
    lost, gained = outcomes(items["right"].tolist(), items["dense_right"].tolist())
    total = _kept(items) | {"gained": gained, "lost": lost, "p": mcnemar_p(lost, gained)}
    if "distance" not in items or items["distance"].isna().all():
        return total
    buckets = items["distance"].map(distance_bucket)
    near_first = sorted(set(buckets[items["needed"]]), key=lambda bucket: int(str(bucket).split("-")[0]))
    return total | {"by_distance": {bucket: _kept(items[buckets == bucket]) for bucket in near_first}}


def _kept(items: DataFrame) -> dict[str, Any]:
    found = kept(items)
    ends = {"share": found.value, "low": found.low, "high": found.high, "items": found.items}
    return ends | {"clusters": found.clusters, "seeds": found.seeds, "note": found.note}


def counted_tasks(methods: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[str]:
    """Tasks asked for by name that measure something in every method; a group counts once, not its members again."""
    return [task for task in tasks if all(method["tasks"].get(task, {}).get("measures") for method in methods)]


def retention(items: DataFrame, dense: DataFrame, tasks: Sequence[str]) -> dict[str, Any]:
    """The paper's retention over these tasks, 100 x mean of pruned / dense, and its 95 % interval."""
    if not tasks:
        return {"retention": None, "retention_interval": None}
    parts = [(items[items["task"] == task], dense[dense["task"] == task], 0.0) for task in tasks]
    ours, whole = ([float(one["score"].mean()) for one in side] for side in list(zip(*parts))[:2])
    ends = _ends(parts)
    return {"retention": statistics.retention(ours, whole), "retention_interval": ends and [100 * end for end in ends]}


def chance(items: DataFrame) -> float | None:
    """Share of right answers without reading the question; None where it is not known."""
    return average(items, "chance")


def scored(items: DataFrame) -> bool:
    """Whether every item has a score."""
    return len(items) > 0 and bool(items["score"].notna().all())


def standard_error(items: DataFrame) -> float | None:
    """s / sqrt(n) of the scores, which for zeros and ones is lm-eval's; None for fewer than two items."""
    return float(items["score"].astype(float).sem()) if len(items) > 1 else None


def average(items: DataFrame, column: str) -> float | None:
    """Mean of a column; None where an item has no such value."""
    if column not in items or not len(items) or items[column].isna().any():
        return None
    return float(items[column].astype(float).mean())


def _ends(parts: Sequence[tuple[DataFrame, DataFrame, float]]) -> list[float] | None:
    """Interval of the mean over tasks of (pruned - chance) / (dense - chance)."""
    tasks = []
    for items, dense, at_chance in parts:
        both = items[["item", "score"]].merge(dense[["item", "score"]], on="item", suffixes=("", "_dense"))
        labels = documents(items)
        tasks.append((both["score"].tolist(), both["score_dense"].tolist(), at_chance, labels))
    found = statistics.ratio_interval(tasks)
    return None if found is None or found.low is None or found.high is None else [found.low, found.high]
