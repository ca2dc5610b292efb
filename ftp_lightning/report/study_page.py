"""The page of a study: its question, what differs by more than its interval, a figure per metric, the table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftp_lightning.report.figures import column
from ftp_lightning.report.sections import Plot
from ftp_lightning.report.series import Rows
from ftp_lightning.report.study import Study, half_width, statements, study_rows, table
from ftp_lightning.report.style import BLUE, INK, ORANGE, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def study_plots(study: Study) -> list[tuple[Plot, Rows]]:
    """A figure per metric that any row has, with its rows."""
    found, rows = [], study_rows(study)
    for place, metric in enumerate(study["metrics"], start=1):
        mine = [plain(row, study) for row in rows if row["metric"] == metric["name"] and row["mean"] is not None]
        if not mine:
            continue
        caption = "Large dot: mean over seeds; whiskers: its 95 % interval (Student's t); small dots: single seeds."
        if study["baseline"]:
            caption += f" Dashed: the baseline, {study['baseline']}."
        name = f"study-{place}-{re.sub(r'[^a-z0-9]+', '-', metric['name'].lower()).strip('-')[:40]}"
        title = metric["title"] + {"higher": ": higher is better", "lower": ": lower is better"}.get(
            metric["better"], ""
        )
        unit = f" ({metric['unit']})" if metric["unit"] else ""
        found.append((Plot(name, title, caption, lambda run: [], Points(metric["title"] + unit), True), mine))
    return found


def plain(row: dict[str, Any], study: Study) -> dict[str, Any]:
    """A row as its CSV has it: the seeds' values in one cell."""
    is_baseline = int(row["label"] == study.get("baseline"))
    return {**row, "values": " ".join(map(repr, row["values"])), "baseline": is_baseline}


class Points:
    """Draws one metric: settings from top to bottom."""

    def __init__(self, label: str) -> None:
        self.label = label

    def __call__(self, rows: Rows) -> Figure:
        figure, axis = canvas(11, 1.0 + 0.36 * len(rows))
        for place, row in enumerate(rows):
            colour = ORANGE if row["baseline"] else BLUE
            seeds = [float(value) for value in row["values"].split()]
            axis.plot(seeds, [place + 0.24] * len(seeds), "o", color=colour, markersize=4, alpha=0.6, markeredgewidth=0)
            reach = half_width(row["std"], row["seeds"])
            error = {"xerr": [[reach], [reach]]} if reach is not None else {}
            axis.errorbar([row["mean"]], [place], **error, fmt="o", color=colour, markersize=7, capsize=4)
            if row["baseline"]:
                axis.axvline(row["mean"], color=INK, linestyle="--", linewidth=0.9, zorder=0)
        axis.set_yticks(range(len(rows)), column(rows, "label"))
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel(self.label + zero_text(axis.get_xlim()))
        return figure


def zero_text(limits: tuple[float, float]) -> str:
    """What an axis must say that does not show its zero."""
    low, high = limits
    return "" if low <= 0 <= high else f"; the axis does not show 0, it begins at {low:.3g}"


def study_context(folder: Path, study: Study, plots: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything the template study.html names."""
    columns, cells = table(study)
    seeds = sorted({str(seed) for row in study["rows"] for seed in row["seeds"]})
    contents = [("outcome", "What differs"), ("table", "Table"), ("figures", "Figures"), ("origin", "Command")]
    return {
        "name": folder.resolve().name,
        "facts": [f"{len(study['rows'])} settings", f"seeds {', '.join(seeds)}"],
        "verdict": study.get("question") or "A study without a question.",
        "cautions": few_seeds(study),
        "cards": [],
        "contents": contents,
        "statements": statements(study),
        "columns": columns,
        "cells": cells,
        "baseline": study["baseline"],
        "own_intervals": study.get("compared") is not None,
        "plots": plots,
        "command": study.get("command"),
        "rows": study["rows"],
        "story": None,
    }


def few_seeds(study: Study) -> list[str]:
    """Fewer than three seeds say little [method, section 10]."""
    few = [row["label"] for row in study["rows"] if len(row["seeds"]) < 3]
    return [f"Fewer than 3 seeds: {', '.join(few)}."] if few else []
