"""What results.json holds: the methods of one evaluation side by side, made from the bench and its record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ftp_lightning.evaluation.bench import DELETED, OWN_ANSWERS, Bench
from ftp_lightning.evaluation.cells import counted_tasks, dense_cell, kept_cell, retention, task_cell
from ftp_lightning.evaluation.continuation import other_attention
from ftp_lightning.evaluation.pairing import claims, compare
from ftp_lightning.evaluation.record import DENSE, joined

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
    own = kept_cell(of(items, name, OWN_ANSWERS)) if OWN_ANSWERS in bench.texts else None
    headline = next((task for task in tasks if task in twins(items)), None)
    return {
        "name": name,
        "budget": pruner.scheduled.budget,
        "kv": pruner.kv[0] if len(set(pruner.kv)) == 1 else "mixed",
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
