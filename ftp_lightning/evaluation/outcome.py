"""What results.json holds: methods and tasks of one evaluation side by side, plain values made from the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ftp_lightning.data.choices import distance_bucket
from ftp_lightning.evaluation import statistics
from ftp_lightning.evaluation.bench import DELETED, OWN_ANSWERS, Bench
from ftp_lightning.evaluation.continuation import other_attention
from ftp_lightning.evaluation.pairing import claims, compare
from ftp_lightning.evaluation.record import DENSE, documents, flops_cut, joined, kept, mean, outcomes, pairs, seeds
from ftp_lightning.evaluation.statistics import Interval, mcnemar_p
from ftp_lightning.schedule import kv_name

if TYPE_CHECKING:
    from pandas import DataFrame

    from ftp_lightning.pruning import TokenPruner

SEQUENCE = " (sequence)"
"""End of a method's name in the record, where its tasks were routed as a whole."""


def results_of(
    bench: Bench, items: DataFrame, methods: Sequence[tuple[str, TokenPruner]], tasks: Sequence[str]
) -> dict[str, Any]:
    """Dense, noise floor, methods, the tasks that count, and paired claims.

    items: the record of all methods, dense included. tasks: those asked for by name.
    """
    text = next(iter(bench.texts))
    floor = bench.noise_floor(text)
    against = f"{other_attention(bench.model)} attention, one row at a time"
    dense = {task: dense_cell(of(items, DENSE, task), bench.metrics[DENSE].get(task, {})) for task in asked(items)}
    told = [_method(bench, items, name, pruner, tasks) for name, pruner in methods]
    counted = counted_tasks(told, tasks)
    for method in told:
        own = items[items["method"] == method["name"]]
        method |= retention(own, items[items["method"] == DENSE], counted)
    return {
        "dense": {"ppl": floor.dense_ppl, "tasks": dense},
        "noise_floor": {"kl": floor.kl_mean, "top1": floor.top1_agreement, "against": against},
        "methods": told,
        "counted": counted,
        "paired": claims(items, [name for name, _ in methods]),
    }


def of(items: DataFrame, method: str, task: str) -> DataFrame:
    """The items of one method on one task."""
    return items[(items["method"] == method) & (items["task"] == task)]


def asked(items: DataFrame) -> list[str]:
    """Tasks that lm-eval has asked, without their twins, in order."""
    if "metric" not in items:
        return []
    known = items[(items["method"] == DENSE) & items["metric"].notna()]["task"]
    return [task for task in dict.fromkeys(known) if not task.endswith(DELETED)]


def twins(items: DataFrame) -> list[str]:
    """Tasks that were also asked without their passages."""
    return [task.removesuffix(DELETED) for task in dict.fromkeys(items["task"]) if task.endswith(DELETED)]


def _method(bench: Bench, items: DataFrame, name: str, pruner: TokenPruner, tasks: Sequence[str]) -> dict[str, Any]:
    """One method: its text in both modes, its tasks, and the answers it keeps."""
    text = next(iter(bench.texts))
    prompt, sequence = (
        bench.scores.get((name, text, mode)) or bench.score(name, pruner, text, mode) for mode in ("prompt", "sequence")
    )
    own = own_answers_cell(of(items, name, OWN_ANSWERS)) if OWN_ANSWERS in bench.texts else None
    headline = next((task for task in tasks if task in twins(items)), None)
    return {
        "name": name,
        "budget": pruner.scheduled.budget,
        "kv": kv_name(pruner.kv),
        "realised_sparsity": prompt.mean_sparsity,
        "realised_per_block": prompt.sparsity,
        "flops_reduction": prompt.flops_cut,
        "kl": {"mean": prompt.kl_mean, "p99": prompt.kl_p99, "top1": prompt.top1_agreement},
        "agreement": {"first": _share(prompt.first_rows), "whole": _share(prompt.agreed_rows)},
        "own_answers": own,
        "kl_sequence": sequence.kl_mean,
        "ppl": {"prompt": prompt.ppl, "sequence": sequence.ppl},
        "kept": kept_cell(of(items, name, headline)) if headline else own,
        "tasks": {task: _task(bench, items, name, task) for task in asked(items)},
    }


def _task(bench: Bench, items: DataFrame, name: str, task: str) -> dict[str, Any]:
    found, dense = of(items, name, task), of(items, DENSE, task)
    cell = task_cell(found, dense, bench.metrics[name].get(task, {}), task in twins(items))
    other = of(items, name + SEQUENCE, task)
    if len(other):
        cell["sequence"] = _leak(found, other, name)
    return cell


def _leak(prompt: DataFrame, sequence: DataFrame, name: str) -> dict[str, Any] | None:
    """The score of mode "sequence", and its paired difference to mode "prompt" on the same items."""
    pairs = compare(joined([prompt, sequence]), name + SEQUENCE, name)
    if not pairs:
        return None
    ends = {key: pairs[0][key] for key in ("difference", "low", "high", "lost", "gained", "p")}
    cell = dense_cell(sequence, {})
    return {"acc": cell["acc"], "stderr": cell["stderr"]} | ends


def _share(verdicts: Sequence[bool]) -> float | None:
    return sum(verdicts) / len(verdicts) if verdicts else None


# ---------------------------------------------------------------- one task

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
        "chance": average(items, "chance"),
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


def own_answers_cell(items: DataFrame) -> dict[str, Any] | None:
    """Whole answers of the dense model that are kept, and of the same rows the first tokens and the KL per token.

    `first` is a share, `kl` the mean over answers of the KL per token in nats; both with their intervals.
    """
    whole = kept_cell(items)
    return whole and whole | {"first": _told(mean(items, "first")), "kl": _told(mean(items, "kl"), "mean")}


def _kept(items: DataFrame) -> dict[str, Any]:
    return _told(kept(items))


def _told(found: Interval, name: str = "share") -> dict[str, Any]:
    ends = {name: found.value, "low": found.low, "high": found.high, "items": found.items}
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
        named = joined([items.assign(method="pruned"), dense.assign(method=DENSE)])
        both = pairs(named, "pruned", DENSE, "score")
        tasks.append((both["a"].tolist(), both["b"].tolist(), at_chance, documents(both), seeds(both)))
    found = statistics.ratio_interval(tasks)
    return None if found is None or found.low is None or found.high is None else [found.low, found.high]
