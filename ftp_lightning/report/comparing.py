"""Runs side by side: what was set otherwise, what came out, and whether the difference is more than chance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftp_lightning.errors import UserError
from ftp_lightning.report.outcome_series import with_best
from ftp_lightning.report.reading import STAGES, Run, read_config, read_run, read_text
from ftp_lightning.report.series import Rows
from ftp_lightning.report.verdict import speed_row
from ftp_lightning.report.wording import MISSING, headline_method, kept_text, kv_per_block, number, percent

PATHS = {"output", "overwrite", "tracking", "pruned", "before", "static_schedule", "schedule", "sensitivity"}
"""Settings that say where something lies, not what is done."""

RECALL, DELETED = "story_recall", "story_recall_deleted"
Runs = dict[str, Run]
"""Label -> run, in the order they were named."""


def read_runs(folders: list[Path]) -> Runs:
    """The runs by label: the folder's name, with as many of its parents as tell them apart.

    Errors: UserError for fewer than two folders, the same twice, and what `read_run` refuses.
    """
    paths = [folder.resolve() for folder in folders]
    if len(paths) < 2 or len({*paths}) < len(paths):
        raise UserError("a comparison needs two different runs or more\nGive `report` the folders of several runs.")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return {"/".join(path.parts[-depth:]): read_run(path) | {"folder": path} for path in paths}


def settings_that_differ(runs: Runs) -> list[list[str]]:
    """Rows of cells: "stage key", then its value in each run; settings that all runs have alike are left out."""
    rows = []
    for stage in STAGES:
        configs = [read_config(run["folder"] / stage) for run in runs.values()]
        for key in dict.fromkeys(key for config in configs for key in config):
            values = [str(config.get(key, MISSING)) for config in configs]
            if key not in PATHS and len({*values}) > 1:
                rows.append([f"{stage} {key}", *values])
    return rows


OUTCOMES = ("run", "method", "skipped", "FLOPs cut", "kept [95 %]", "KL", "prefill speed [95 %]", "at tokens")


def outcome_cells(label: str, run: Run) -> list[str]:
    """The headline method of one run, columns as in `OUTCOMES`."""
    method, row = headline_method(run["evaluate"]) or {}, speed_row(run)
    pace = f"{row['speedup']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]" if row else MISSING
    return [
        label, method.get("name", MISSING), percent(method.get("realised_sparsity")),
        percent(method.get("flops_reduction")), kept_text(method.get("kept")),
        number((method.get("kl") or {}).get("mean")), pace, f"{row['length']:,}" if row else MISSING,
    ]  # fmt: skip


# ---------------------------------------------------------------- rows of the figures


def pareto(runs: Runs) -> Rows:
    """method, label, flops_cut, share, low, high, best: the headline methods; `method` is the run, for its colour."""
    rows = []
    for label, run in runs.items():
        method = headline_method(run["evaluate"]) or {}
        if method.get("kept"):
            kept = {name: method["kept"][name] for name in ("share", "low", "high")}
            rows.append({"method": label, "label": label, "flops_cut": method["flops_reduction"], **kept})
    return with_best(rows)


def schedules(runs: Runs) -> Rows:
    """run, block, sparsity, kv: the last schedule of every run; kv is empty where the schedule does not say it."""
    found = ((label, run["finetune_schedule"] or run["search_schedule"]) for label, run in runs.items())
    return [
        {"run": label, "block": block, "sparsity": sparsity, "kv": modes[block - 1] if modes else ""}
        for label, schedule in found
        if schedule
        for modes in [kv_per_block(schedule)]
        for block, sparsity in enumerate(schedule["sparsity"], start=1)
    ]


def validation(runs: Runs) -> Rows:
    """run, step, kl: validation KL while the router was trained."""
    return [
        {"run": label, **point}
        for label, run in runs.items()
        for point in (run["train"] or {}).get("validation_kl", [])
    ]


def speed(runs: Runs) -> Rows:
    """run, length, batch, kv, budget, speedup, low, high, flops_limit: every benchmark row of every run."""
    names = ("length", "batch", "kv", "budget", "speedup", "low", "high", "flops_limit")
    rows = [(label, row) for label, run in runs.items() for row in (run["benchmark"] or {}).get("rows", [])]
    return [{"run": label, **{name: row.get(name) for name in names}} for label, row in rows]


# ---------------------------------------------------------------- paired differences


def paired(runs: Runs) -> list[str]:
    """A sentence for every run but the first: its answers against the first's on the questions both were asked.

    Of the questions that dense answers right with the passage and wrong without it, in both runs. The interval knows
    documents (`evaluation.statistics.paired`), not how a second training would differ: each run is one.
    """
    first, *others = runs
    answers = {label: recall_answers(run) for label, run in runs.items()}
    return [difference(first, other, answers[first], answers[other]) for other in others]


def recall_answers(run: Run) -> dict[str, tuple[bool, Any]]:
    """Hash of the question -> (right?, document) of the headline method, of questions that need the passage; empty
    without them."""
    method = (headline_method(run["evaluate"]) or {}).get("name")
    text = read_text(run["folder"] / "evaluate" / "record.jsonl")
    rows = [json.loads(line) for line in (text or "").splitlines() if line.strip()]
    return {
        row["hash"]: (row["right"], row["document"])  # of its words: runs may number different questions alike
        for row in rows
        if row["task"] == RECALL and row["method"] == method and row.get("needed")
    }


def difference(first: str, other: str, base: dict, own: dict) -> str:
    """ "b against a: cannot be told apart; answers kept +1.2 points [-0.5, 2.9], paired, 280 questions."."""
    from ftp_lightning.evaluation.statistics import paired

    both = [item for item in own if item in base]
    documents = [own[item][1] for item in both]
    if len({*documents}) < 2:
        return f"{other} against {first}: they were not asked the same questions, so nothing can be paired."
    right = [[float(answers[item][0]) for item in both] for answers in (own, base)]
    found = paired(right[0], right[1], documents)
    said = {1: "keeps more", -1: "keeps fewer", 0: "cannot be told apart"}[found.sign]
    value, low, high = (100 * (end or 0.0) for end in (found.value, found.low, found.high))
    interval = f"{value:+.1f} points [{low:.1f}, {high:.1f}]"
    return f"{other} against {first}: {said}; answers kept {interval}, paired, {len(both):,} questions."
