"""What an evaluation says, as tables: methods, tasks, paired tests, and retention beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftp_lightning.evaluation import quoted
from ftp_lightning.evaluation.harness.declared import PAPER
from ftp_lightning.evaluation.tables import (
    Record,
    Table,
    fixed,
    number,
    percent,
    text,
    with_error,
    with_interval,
)

Results = Mapping[str, Any]


def result_tables(results: Results) -> list[Table]:
    """All tables of one results.json."""
    tables = [methods_table(results), tasks_table(results), leak_table(results), pairs_table(results)]
    return [*tables, retention_table(results)]


def methods_table(results: Results) -> Table:
    """Dense, the noise floor, and every method on text."""
    floor = results["noise_floor"]
    rows: list[Record] = [
        {"method": "dense", "realised": 0.0, "flops_cut": 0.0, "kl": 0.0, "top1": 1.0, "ppl": results["dense"]["ppl"]},
        {"method": f"noise floor: dense, {floor['against']}", "kl": floor["kl"], "top1": floor["top1"]},
    ]
    for method in results["methods"]:
        rows.append(
            {
                "method": method["name"],
                "kv": method["kv"],
                "budget": method["budget"],
                "realised": method["realised_sparsity"],
                "flops_cut": method["flops_reduction"],
                "kl": method["kl"]["mean"],
                "kl_p99": method["kl"]["p99"],
                "top1": method["kl"]["top1"],
                "ppl": method["ppl"]["prompt"],
                "ppl_sequence": method["ppl"]["sequence"],
                **_prefixed("kept", method["kept"], ("share", "low", "high", "items")),
                **_retention(method),
            }
        )
    columns = {
        "method": text("method"),
        "kv": text("kv"),
        "budget, %": percent("budget"),
        "realised, %": percent("realised"),
        "FLOPs cut, %": percent("flops_cut"),
        "kept, % [95 %]": with_interval("kept_share", "kept_low", "kept_high"),
        "KL": number("kl"),
        "KL p99": number("kl_p99"),
        "top-1, %": percent("top1", 2),
        "PPL": fixed("ppl", 2),
        "PPL sequence": fixed("ppl_sequence", 2),
        "retention, % [95 %]": with_interval("retention", "retention_low", "retention_high", 1.0),
    }
    return Table("methods", "Methods on text", columns, rows)


def tasks_table(results: Results) -> Table:
    """One row per task and method, dense first."""
    rows: list[Record] = []
    for task, dense in results["dense"]["tasks"].items():
        rows.append({"task": task, "method": "dense", **_scored(dense), "mark": _mark(dense)})
        for method in results["methods"]:
            if cell := method["tasks"].get(task):
                kept = _prefixed("kept", cell.get("kept"), ("share", "low", "high", "items"))
                rows.append({"task": task, "method": method["name"], **_scored(cell), **kept, "mark": _mark(cell)})
    columns = {
        "task": text("task"),
        "method": text("method"),
        "metric": text("metric"),
        "items": text("n"),
        "chance, %": percent("chance"),
        "prompt tokens": fixed("prompt_tokens", 0),
        "sparsity, %": percent("sparsity"),
        "FLOPs cut, %": percent("flops_cut"),
        "score, %": with_error("score", "stderr"),
        "[95 %]": lambda r: with_interval("score", "low", "high")(r).partition(" ")[2],
        "skill, % [95 %]": with_interval("skill", "skill_low", "skill_high"),
        "kept, % [95 %]": with_interval("kept_share", "kept_low", "kept_high"),
        "mark": text("mark"),
    }
    notes = (
        "c: dense is within 2 standard errors of chance. e: not exercised, the prompts are too short to be pruned. "
        "Both count in no mean. t: so many contexts were cut to the model's window.",
    )
    return Table("tasks", "Tasks", columns, rows, notes)


def leak_table(results: Results) -> Table:
    """The same pruned model, the prompt alone routed and the whole text: what the answer tells its own question."""
    rows = [
        {"task": task, "method": method["name"], "prompt": cell["acc"], **cell["sequence"]}
        for method in results["methods"]
        for task, cell in method["tasks"].items()
        if cell.get("sequence")
    ]
    columns = {
        "task": text("task"),
        "method": text("method"),
        "`prompt`, %": percent("prompt"),
        "`sequence`, %": percent("acc"),
        "difference [95 %]": with_interval("difference", "low", "high", sign="+"),
        "lost": text("lost"),
        "gained": text("gained"),
        "p": number("p", 2),
    }
    return Table(
        "leak", "The same model in both modes", columns, rows, ("In `sequence` later tokens move the routing.",)
    )


def pairs_table(results: Results) -> Table:
    """Paired tests on the same items."""
    columns = {
        "task": text("task"),
        "A": text("a"),
        "B": text("b"),
        "items": text("items"),
        "documents": text("clusters"),
        "A - B, points [95 %]": with_interval("difference", "low", "high", sign="+"),
        "lost": text("lost"),
        "gained": text("gained"),
        "McNemar p": number("p", 2),
    }
    notes = ("The interval knows documents, not trainings. A differs from B where it excludes 0; none: one document.",)
    return Table("pairs", "Paired tests", columns, results.get("paired", ()), notes)


def retention_table(results: Results) -> Table:
    """Ours over the paper's tasks beside the paper's own numbers; empty where none of its tasks was run."""
    asked = [task for task in PAPER if task in results["dense"]["tasks"]]
    ours = [
        {"model": "this model", "method": m["name"], "sparsity": m["budget"], **_retention(m), "source": "measured"}
        for m in results["methods"]
    ]
    counted = ", ".join(results.get("counted", ())) or "none: no task measures anything"
    notes = (f"Measured over: {counted}.", "Quoted rows are of other models, harness versions and settings.")
    return Table("retention", "Retention beside the paper's", RETENTION, [*ours, *quoted.MAIN] if asked else [], notes)


RETENTION = {
    "model": text("model"),
    "method": text("method"),
    "sparsity, %": percent("sparsity"),
    "retention, % [95 %]": with_interval("retention", "retention_low", "retention_high", 1.0),
    "source": text("source"),
}


def _retention(method: Mapping[str, Any]) -> Record:
    low, high = method.get("retention_interval") or (None, None)
    return {"retention": method.get("retention"), "retention_low": low, "retention_high": high}


def _scored(cell: Mapping[str, Any]) -> Record:
    names = ("metric", "n", "chance", "prompt_tokens", "sparsity", "flops_cut", "stderr", "low", "high", "skill")
    low, high = cell.get("skill_interval") or (None, None)
    return {"score": cell["acc"], **{k: cell.get(k) for k in names}, "skill_low": low, "skill_high": high}


def _mark(cell: Mapping[str, Any]) -> str:
    cut = cell.get("truncated") or 0
    marks = ["c"] * bool(cell.get("near_chance")) + ["e"] * (cell.get("exercised") is False)
    return " ".join([*marks, *([f"t{cut}"] if cut else [])])


def _prefixed(prefix: str, values: Mapping[str, Any] | None, names: tuple[str, ...]) -> Record:
    return {f"{prefix}_{name}": values[name] for name in names} if values else {}
