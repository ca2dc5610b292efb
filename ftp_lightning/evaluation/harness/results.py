"""From lm-eval's log of a run to one summary per task, with an account of what each score stands on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ftp_lightning.evaluation.harness.declared import declared
from ftp_lightning.evaluation.statistics import chance_of

METRICS = ("acc", "acc_norm", "exact_match")
PASSED_ON = ("distance", "kind", "document")
ACCOUNTED = ("prompt_tokens", "continuation_tokens", "sparsity", "skipped", "exercised", "truncated")
COUNTING = (*METRICS, "em", "f1", "string_match", "contains", "score", "qa_f1_score")
"""Metrics that count answers, in the order in which they are told where none is declared."""


def summaries(
    results: Mapping,
    names: Sequence[str],
    accounts: Iterable,
    left_out: Mapping[str, int] | None = None,
    labels: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, dict]:
    """Summary per task that ran and, pooled, per named group; results: what `simple_evaluate` returns.

    left_out: task -> documents of it that were not asked. labels: task -> right answers of all its documents, asked or
    not, see `labels_of`.
    """
    book = {_asked(account.request): account for account in accounts if account.request is not None}
    items = {
        task: [_item(task, sample, book) for sample in _first_filter(log)] for task, log in results["samples"].items()
    }
    gone, known = left_out or {}, labels or {}
    summary = {
        task: summarize(group, results["results"].get(task, {}), known.get(task)) | {"left_out": gone.get(task, 0)}
        for task, group in items.items()
    }
    for name in names:
        tree = results.get("group_subtasks", {})
        members = _members(name, tree) or _members(f"local_{name}", tree)
        if name not in summary and members:
            pooled = [_within(member, item) for member in members for item in items.get(member, [])]
            every = [label for member in members for label in known.get(member) or ()]
            summary[name] = summarize(pooled, results["results"].get(name, {}), every)
            summary[name]["left_out"] = sum(gone.get(member, 0) for member in members)
    return summary


def _within(member: str, item: dict) -> dict:
    """The item of a group's member under ids of its own: every member counts items and documents from 0."""
    document = item["document"]
    return item | {
        "id": f"{member}/{item['id']}",
        "document": None if document is None else f"{member}/{document}",
    }


def labels_of(task: Any) -> list[int]:
    """The place of the right answer of each document of an lm-eval task, asked or not; empty where the documents do not
    all offer the same choices."""
    choices = getattr(task.config, "doc_to_choice", None)
    if task.OUTPUT_TYPE != "multiple_choice" or not isinstance(choices, list):
        return []
    targets = [task.doc_to_target(document) for document in task.eval_docs]
    found = [choices.index(one) if one in choices else one for one in targets]
    return found if all(isinstance(one, int) and 0 <= one < len(choices) for one in found) else []


def summarize(items: list[dict], metrics: Mapping, labels: Sequence[int] | None = None) -> dict:
    """The items of a task, its chance, and lm-eval's own numbers under their plain names. labels: as `labels_of`."""
    return {"chance": _chance_of(items, labels or ()), "metrics": _plain_metrics(metrics), "items": items}


def _item(task: str, sample: Mapping, book: Mapping) -> dict:
    """One scored document: its values, its labels, the answers to its requests, and the account of the first of them
    (all share its context). `hash` is that of all that was asked: two runs asked the same where it is the same."""
    doc, values = sample["doc"], {metric: sample.get(metric) for metric in METRICS}
    asked = [_asked(arguments) for arguments in sample["arguments"]]
    account = book.get(asked[0])
    metric, score = _score(task, sample)
    return {
        "id": doc.get("id", sample["doc_id"]),
        "subject": task,
        "hash": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
        "right": _right(task, sample, score),
        "metric": metric,
        "score": score,
        **values,
        "chance": _chance(sample, metric, score),
        "label": None if metric == "exact_match" else _label(sample),
        "answers": [_plain_answer(answer) for answer in sample["filtered_resps"]],
        **{key: doc.get(key) for key in PASSED_ON},
        **{key: getattr(account, key, None) for key in ACCOUNTED},
        **(account.spent._asdict() if account is not None and account.spent else {}),
    }


def _asked(arguments: Sequence) -> tuple[str, ...]:
    """A request as a key: generation options are no words."""
    return tuple(a if isinstance(a, str) else json.dumps(a, sort_keys=True, default=str) for a in arguments)


def _score(task: str, sample: Mapping) -> tuple[str, float | None]:
    """The metric that is declared for the task, or the first that counts answers, and its value in [0, 1]; None for
    what is no share of right answers, as perplexities."""
    names = [declared(task).metric, *COUNTING]
    metric = next((name for name in names if isinstance(sample.get(name), int | float)), names[0])
    value = sample.get(metric)
    return metric, float(value) if isinstance(value, int | float) and 0.0 <= value <= 1.0 else None


def _right(task: str, sample: Mapping, score: float | None) -> bool | None:
    """Whether the answer counts as right: by the metric declared for that, else by accuracy or exact match, else where
    the score is at least one half."""
    asked = declared(task).right
    names = (asked,) if asked else ("acc", "exact_match")
    value = next((sample[name] for name in names if sample.get(name) is not None), None)
    if value is not None:
        return value >= 1.0
    return None if score is None else score >= 0.5


def _label(sample: Mapping) -> list | None:
    """The choices of an item and the place of the right one; None where that is not known, or nothing is chosen."""
    choices = [arguments[1] for arguments in sample["arguments"] if len(arguments) > 1]
    gold = sample.get("target")
    try:
        place = int(gold)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return [choices, place] if len(set(map(str, choices))) > 1 and 0 <= place < len(choices) else None


def _chance(sample: Mapping, metric: str, score: float | None) -> float | None:
    """1 / number of choices; 0 of what the model has to write itself, be it one of several choices."""
    choices = len(sample["filtered_resps"])
    return 1 / choices if choices > 1 and metric != "exact_match" else (None if score is None else 0.0)


def _chance_of(items: Sequence[Mapping], labels: Sequence[int]) -> float | None:
    """Mean chance of the items; where all offer the same choices, what always giving one answer scores.

    Who always says "yes" to BoolQ is right in 62 % of the cases, see `statistics.chance_of`. A few items do not tell
    that, so the labels of all documents count, where they are known. None where it is not known of an item.
    """
    known = [item["chance"] for item in items if item["chance"] is not None]
    if not items or len(known) < len(items):
        return None
    mean = math.fsum(known) / len(known)
    told = [item.get("label") for item in items]
    if not mean or any(label is None or label[0] != told[0][0] for label in told):  # type: ignore[index]
        return mean
    return chance_of(labels or [label[1] for label in told if label], len(told[0][0]))  # type: ignore[index]


def _plain_answer(answer: Any) -> Any:
    """A log-likelihood as a number, a generated text as it is."""
    return answer[0] if isinstance(answer, list | tuple) and answer else answer


def _first_filter(log: Sequence[Mapping]) -> list[Mapping]:
    """lm-eval logs a document once per answer filter, of which one is enough here; in order, as ranks take turns."""
    first = [sample for sample in log if sample.get("filter") == log[0].get("filter")]
    return sorted(first, key=lambda sample: sample["doc_id"])


def _members(name: str, tree: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks below a group, however deep."""
    return [leaf for child in tree.get(name, ()) for leaf in (_members(child, tree) or [child])]


def _plain_metrics(metrics: Mapping) -> dict[str, float]:
    """`acc,none` -> `acc`; numbers only (a stderr that was not bootstrapped is the word N/A), of several answer filters
    the first."""
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float) and "," in key}
    return {key.split(",")[0]: float(value) for key, value in reversed(numbers.items())}
