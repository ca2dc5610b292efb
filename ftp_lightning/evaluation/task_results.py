"""From lm-eval's log of a run to one summary per task, with an account of what each score stands on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

METRICS = ("acc", "acc_norm", "exact_match")
PASSED_ON = ("distance", "kind", "document")
ASKED = ("story_recall", "story_recall_deleted")
"""Tasks whose answer counts as right only where it is what the model would write; elsewhere the likeliest choice."""


def summaries(results: Mapping, names: Sequence[str], accounts: Iterable) -> dict[str, dict]:
    """Summary per task that ran and, pooled, per named group; results: what `simple_evaluate` returns."""
    book = {account.request: account for account in accounts}
    items = {
        task: [_item(task, sample, book) for sample in _first_filter(log)] for task, log in results["samples"].items()
    }
    summary = {task: summarize(group, results["results"].get(task, {})) for task, group in items.items()}
    for name in names:
        members = _members(name, results.get("group_subtasks", {}))
        if name not in summary and members:
            pooled = [item for member in members for item in items.get(member, [])]
            summary[name] = summarize(pooled, results["results"].get(name, {}))
    return summary


def summarize(items: list[dict], metrics: Mapping) -> dict:
    """Means over the items; acc_stderr = sqrt(p (1 - p) / (n - 1)), as lm-eval's mean_stderr of zeros and ones.

    A mean is None where an item has no such value. `metrics` keeps lm-eval's own numbers under their plain names.
    """
    acc = _mean([item["acc"] for item in items])
    stderr = math.sqrt(acc * (1 - acc) / (len(items) - 1)) if acc is not None and len(items) > 1 else None
    return {
        "acc": acc,
        "acc_stderr": stderr,
        "acc_norm": _mean([item["acc_norm"] for item in items]),
        "exact_match": _mean([item["exact_match"] for item in items]),
        "n": len(items),
        "chance": _mean([item["chance"] for item in items]),
        **{key: _mean([item[key] for item in items]) for key in ("exercised", "prompt_tokens", "sparsity")},
        "truncated": sum(bool(item["truncated"]) for item in items),
        "metrics": _plain_metrics(metrics),
        "items": items,
    }


def _item(task: str, sample: Mapping, book: Mapping) -> dict:
    """One scored document: its values, its labels, and the account of its first request (all share its context)."""
    doc, values = sample["doc"], {metric: sample.get(metric) for metric in METRICS}
    account = book.get(tuple(sample["arguments"][0]))
    choices = len(sample["filtered_resps"])
    order = ("exact_match", "acc") if task in ASKED else ("acc", "exact_match")
    return {
        "id": doc.get("id", sample["doc_id"]),
        "right": bool(next((values[m] for m in order if values[m] is not None), False)),
        **values,
        "chance": 1 / choices if choices > 1 else None,
        **{key: doc.get(key) for key in PASSED_ON},
        **{key: getattr(account, key, None) for key in ("prompt_tokens", "sparsity", "exercised", "truncated")},
    }


def _first_filter(log: Sequence[Mapping]) -> list[Mapping]:
    """lm-eval logs a document once per answer filter; one of them is enough here."""
    return [sample for sample in log if sample.get("filter") == log[0].get("filter")]


def _members(name: str, tree: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks below a group, however deep."""
    return [leaf for child in tree.get(name, ()) for leaf in (_members(child, tree) or [child])]


def _mean(values: Sequence[float | None]) -> float | None:
    return None if not values or None in values else math.fsum(values) / len(values)


def _plain_metrics(metrics: Mapping) -> dict[str, float]:
    """`acc,none` -> `acc`; numbers only (a stderr that was not bootstrapped is the word N/A)."""
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float) and "," in key}
    return {key.split(",")[0]: float(value) for key, value in numbers.items()}
