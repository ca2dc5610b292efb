"""The page that puts runs side by side: its figures, and what its template names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftp_lightning.report import comparing
from ftp_lightning.report.comparing import OUTCOMES, Runs
from ftp_lightning.report.diagnostics import diagnose
from ftp_lightning.report.figures import block_axis, column, top_legend, whiskers
from ftp_lightning.report.outcome_figures import length_axis, pareto
from ftp_lightning.report.reading import read_origins
from ftp_lightning.report.sections import Plot
from ftp_lightning.report.series import Rows
from ftp_lightning.report.style import CYCLE, INK, LINES, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def looks(rows: Rows) -> dict[str, dict[str, Any]]:
    """Run -> colour, marker and line, so that runs are told apart without colours too."""
    runs = list(dict.fromkeys(column(rows, "run")))
    return {
        run: {"color": CYCLE[i % 6], "marker": "osD^vP"[i % 6], "linestyle": LINES[i // 6 % 4]}
        for i, run in enumerate(runs)
    }


def of_run(rows: Rows, run: str) -> Rows:
    return [row for row in rows if row["run"] == run]


def schedules(rows: Rows) -> Figure:
    """Sparsity per block of every run; a cross where a block evicts, in runs of several kv modes."""
    figure, axis = canvas(11, 3.2)
    for run, look in looks(rows).items():
        mine = of_run(rows, run)
        axis.plot(column(mine, "block"), column(mine, "sparsity"), **look, label=run, clip_on=False)
        crossed = [row for row in mine if row["kv"] == "evict"] if len({row["kv"] for row in mine}) > 1 else []
        axis.plot(column(crossed, "block"), column(crossed, "sparsity"), "x", color=look["color"], markersize=11)
    axis.set(ylim=(0, 1), ylabel="sparsity (share of tokens skipped)")
    block_axis(axis, max(column(rows, "block")))
    top_legend(axis)
    return figure


def validation(rows: Rows) -> Figure:
    """Validation KL of every run's router."""
    figure, axis = canvas(11, 3.2)
    for run, look in looks(rows).items():
        mine = of_run(rows, run)
        axis.plot(column(mine, "step"), column(mine, "kl"), **look, label=run)
    axis.set(xlabel="training step", ylabel="KL to dense (nats per token)", ylim=(0, None))
    top_legend(axis)
    return figure


def speed(rows: Rows) -> Figure:
    """Prefill speed-up against length, the smallest batch of every run."""
    figure, axis = canvas(11, 3.2)
    for run, look in looks(rows).items():
        mine = of_run(rows, run)
        mine = [row for row in mine if row["batch"] == min(column(mine, "batch"))]
        settings = dict.fromkeys((row["kv"], row["budget"]) for row in mine)
        for kv, budget in settings:
            those = sorted((r for r in mine if (r["kv"], r["budget"]) == (kv, budget)), key=lambda row: row["length"])
            label = f"{run}, {kv}, {budget:.0%}, batch {those[0]['batch']}"
            bars = whiskers(those, "speedup")
            axis.errorbar(column(those, "length"), column(those, "speedup"), yerr=bars, **look, capsize=3, label=label)
    axis.axhline(1, color=INK, linewidth=1)
    axis.set(xlabel="prompt length (tokens, log scale)", ylabel="prefill speed-up\n(dense / pruned)", ylim=(0, None))
    length_axis(axis, sorted({*column(rows, "length")}))
    top_legend(axis, columns=3)
    return figure


PLOTS = (
    Plot("compare-pareto", "What the saving costs", "The headline method of every run, with 95 % intervals. Right and "
         "up is better. Dashed: the runs that no other beats in both.", comparing.pareto, pareto, True),
    Plot("compare-schedules", "Sparsity of every block", "The last schedule of every run. Blocks are numbered from 1, "
         "nearest the input. Crossed: skipped tokens leave no keys and values (evict), where others keep theirs.",
         comparing.schedules, schedules, True),
    Plot("compare-validation", "Validation while training", "Comparable where the validation text and the budget are "
         "the same.", comparing.validation, validation, True),
    Plot("compare-speed", "Prefill, measured", "With 95 % intervals. Comparable where the machine is the same.",
         comparing.speed, speed, True),
)  # fmt: skip


def comparison_context(runs: Runs, plots: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything the template compare.html names."""
    contents = [("outcome", "Outcome"), ("settings", "What was set otherwise"), ("diagnostics", "Diagnostics")]
    found = {
        label: [check["name"] for check in diagnose(run)["checks"] if check["state"] == "found"]
        for label, run in runs.items()
    }
    return {
        "name": f"{len(runs)} runs",
        "facts": list(runs),
        "verdict": " ".join(comparing.paired(runs)),
        "cautions": [],
        "cards": [],
        "contents": [*contents, ("figures", "Figures"), ("origin", "Provenance")],
        "columns": OUTCOMES,
        "cells": [comparing.outcome_cells(label, run) for label, run in runs.items()],
        "settings_columns": ["setting", *runs],
        "settings": comparing.settings_that_differ(runs),
        "found": found,
        "plots": plots,
        "origins": {label: read_origins(Path(run["folder"])) for label, run in runs.items()},
        "story": None,
    }
