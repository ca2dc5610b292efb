"""How the report words its values: numbers, shares, names of methods; one set of rows for terminal and page."""

import math
from typing import Any

MISSING = "–"
UNRESOLVED = "≈ 0"  # a noise floor of exactly 0
HEADLINE = (
    "method", "skipped", "FLOPs cut", "kept [95 %]", "KL", "KL p99", "top-1", "PPL prompt", "PPL sequence", "retention",
)  # fmt: skip


def number(value: float | None, digits: int = 3) -> str:
    """`value` to `digits` significant digits without an exponent where it can be read; a dash for what is not there."""
    if value is None or math.isnan(value):
        return MISSING
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(decimals, 0)}f}"


def signed(value: float) -> str:
    """`number` with its sign; zero has none."""
    return f"{'+' if value > 0 else '-' if value < 0 else ''}{number(abs(value))}"


def percent(share: float | None, digits: int = 1, unit: str = " %") -> str:
    """A share in [0, 1] as per cent."""
    return MISSING if share is None or math.isnan(share) else f"{100 * share:.{digits}f}{unit}"


def kept_text(kept: dict[str, Any] | None) -> str:
    """ "91.2 % [89.7, 92.5]": the share of answers kept and its 95 % interval."""
    if not kept:
        return MISSING
    if kept["low"] is None:
        return f"{percent(kept['share'])} ({kept.get('note') or 'no interval'})"
    return f"{percent(kept['share'])} [{percent(kept['low'], unit='')}, {percent(kept['high'], unit='')}]"


OWN_ANSWERS = ("method", "answers", "whole answers kept [95 %]", "first tokens kept [95 %]", "KL per token [95 %]")


def own_answer_rows(results: dict[str, Any] | None) -> list[tuple[str, ...]]:
    """What each method keeps of the dense model's own answers, columns as in `OWN_ANSWERS`; none without them."""
    told = [(label, method.get("own_answers")) for method, label in method_labels(results)]
    return [
        (label, str(own["items"]), kept_text(own), kept_text(own.get("first")), kl_text(own.get("kl")))
        for label, own in told
        if own
    ]


def kl_text(kl: dict[str, Any] | None) -> str:
    """ "0.021 [0.015, 0.027]": KL in nats per token and its 95 % interval."""
    if not kl:
        return MISSING
    ends = f"[{number(kl['low'])}, {number(kl['high'])}]" if kl["low"] is not None else "(no interval)"
    return f"{number(kl['mean'])} {ends}"


NAMES = {
    "random": "random tokens",
    "uniform": "uniform, static",
    "default": "default, static",
    "first_dense": "first block dense, static",
    "block_influence": "Block Influence",
    "static": "searched, static",
}


def method_name(name: str) -> str:
    """A method's name as it is written on the page; files keep the name of results.json."""
    return NAMES.get(name, name)


def noise_floor_text(results: dict[str, Any] | None) -> str | None:
    """One sentence: what the dense model was compared with to see what cannot be told apart, and the KL found."""
    floor = (results or {}).get("noise_floor")
    if not floor:
        return None
    what = f"dense against {floor['against']}" if floor.get("against") else "dense against dense"
    return f"Noise floor ({what}): KL {floor_kl_text(floor['kl'])}."


def floor_kl_text(kl: float | None) -> str:
    """A floor of exactly 0 is not a measurement of 0: the two computations could not be told apart."""
    return "below what can be resolved" if kl == 0 else number(kl)


def method_labels(results: dict[str, Any] | None) -> list[tuple[dict[str, Any], str]]:
    """(method, label) of every evaluated method; labels name budget and kv mode only where these differ in the run."""
    methods = (results or {}).get("methods") or []
    # a budget is the mean of a schedule: two that were asked for alike may differ in the last bit
    budgets, modes = {round(method["budget"], 6) for method in methods}, {method["kv"] for method in methods}

    def label(method: dict[str, Any]) -> str:
        budget = f" {percent(method['budget'], 0)}" if len(budgets) > 1 else ""
        return method_name(method["name"]) + budget + (f" {method['kv']}" if len(modes) > 1 else "")

    return [(method, label(method)) for method in methods]


def headline_method(results: dict[str, Any] | None) -> dict[str, Any] | None:
    """The method the report speaks about first: `dynamic` (trained and fine-tuned), else the last evaluated one."""
    methods = (results or {}).get("methods") or []
    trained = [method for method in methods if method["name"] == "dynamic"]
    return (trained or methods[-1:] or [None])[0]


def headline_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The headline table as text, columns as in `HEADLINE`: dense, noise floor, then one row per method."""
    ppl = results["dense"].get("ppl")
    rows: list[tuple[str, ...]] = [
        ("dense", percent(0.0), percent(0.0), percent(1.0), "0", "0", percent(1.0), number(ppl), number(ppl), "100.0")
    ]
    floor = results.get("noise_floor")
    if floor:
        agreement = percent(floor.get("top1"), 2)
        kl = number(floor["kl"]) if floor["kl"] else UNRESOLVED
        rows.append(("noise floor", *[MISSING] * 3, kl, MISSING, agreement, *[MISSING] * 3))
    return rows + [(label, *method_cells(method)) for method, label in method_labels(results)]


def method_cells(method: dict[str, Any]) -> tuple[str, ...]:
    """The cells of one method, without its label."""
    kl, ppl, retention = method.get("kl") or {}, method.get("ppl") or {}, method.get("retention")
    return (
        percent(method.get("realised_sparsity")),
        percent(method.get("flops_reduction")),
        kept_text(method.get("kept")),
        number(kl.get("mean")),
        number(kl.get("p99")),
        percent(kl.get("top1"), 2),
        number(ppl.get("prompt")),
        number(ppl.get("sequence")),
        MISSING if retention is None else f"{retention:.1f}",
    )


def headline(results: dict[str, Any]) -> str:
    """The headline table as plain aligned text: `results` is the content of evaluate/results.json."""
    rows = [HEADLINE, *headline_rows(results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADLINE))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def task_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per task: its name, dense accuracy, and for every method a cell `{"text", "skill", "measures"}`.

    `measures` False marks scores that measure nothing: dense is within 2 standard errors of chance, or the prompts were
    too short to be pruned. They count in no mean.
    """
    rows = []
    for task, dense in (results["dense"].get("tasks") or {}).items():
        cells = [task_cell((method.get("tasks") or {}).get(task)) for method, _ in method_labels(results)]
        chance, items = percent(dense.get("chance")), dense.get("n", MISSING)
        measures = any(cell["measures"] for cell in cells)
        rows.append(
            {"task": task, "dense": accuracy(dense), "chance": chance, "n": items, "measures": measures, "cells": cells}
        )
    return rows


def task_cell(score: dict[str, Any] | None) -> dict[str, Any]:
    """Accuracy with its standard error, and skill where it is defined."""
    if score is None:
        return {"text": MISSING, "skill": MISSING, "measures": False}
    return {"text": accuracy(score), "skill": percent(score.get("skill")), "measures": score["measures"]}


def accuracy(score: dict[str, Any]) -> str:
    """ "61.3 ± 1.2 %"; a dash where the task was not scored."""
    if score["acc"] is None:
        return MISSING
    return f"{percent(score['acc'], unit='')} ± {percent(score.get('stderr'))}"


def block_numbers(blocks: list[int]) -> str:
    """[2, 3, 4, 7] -> "2–4, 7"."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def modes_text(schedule: dict[str, Any] | None) -> str | None:
    """A sentence on what skipped tokens leave in each block; None where the schedule does not say its kv mode."""
    if not schedule or not (modes := kv_per_block(schedule)):
        return None
    pruned = [number for number, sparsity in enumerate(schedule["sparsity"], start=1) if sparsity > 0]
    parts = [
        f"{what} in {'block' if len(blocks) == 1 else 'blocks'} {block_numbers(blocks)} ({mode})"
        for mode, what in (("keep", "keep their keys and values"), ("evict", "leave no keys and values"))
        if (blocks := [number for number in pruned if modes[number - 1] == mode])
    ]
    return f"Skipped tokens {', and '.join(parts)}." if parts else "All blocks are dense."


def kv_per_block(schedule: dict[str, Any]) -> list[str] | None:
    """The kv mode of every block of a schedule.json; None where it says none."""
    kv = schedule.get("kv")
    return [kv] * len(schedule["sparsity"]) if isinstance(kv, str) else kv
