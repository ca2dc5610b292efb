"""The page of a tuning: the curve of kept answers against the cut, and the point that was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftp_lightning.products import read_provenance
from ftp_lightning.report.figures import top_legend, whiskers
from ftp_lightning.report.reading import read_config
from ftp_lightning.report.sections import Plot
from ftp_lightning.report.series import Rows
from ftp_lightning.report.style import BLUE, INK, ORANGE, PALE, VERMILLION, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TUNED = "tune.json"
COLUMNS = ("part", "FLOPs cut", "tokens skipped", "answers kept", "first tokens kept", "KL per token", "speed-up")


def curve_rows(found: dict[str, Any]) -> Rows:
    """One row per measured cut: `part` says on which prompts, `chosen` marks the cut that was taken."""
    chosen, rows = found["chosen"]["cut"], []
    for part, curve in (("validation", found["curve"]), ("held-out", found["held_out"])):
        rows += [_row(part, found["recipe"], one, one["cut"] == chosen) for one in curve]
    for recipe, curve in found["recipes"].items():
        rows += [_row("choice", recipe, one, False) for one in curve]
    return [row | {"keep": found["keep"]} for row in rows]


def _row(part: str, recipe: str, one: dict[str, Any], chosen: bool) -> dict[str, Any]:
    names = ("cut", "flops_cut", "budget", "items", "kl", "first")
    kept = {"share": one["kept"], "low": one["kept_low"], "high": one["kept_high"], "speed": one.get("speed")}
    return {"part": part, "recipe": recipe, "chosen": int(chosen)} | {name: one[name] for name in names} | kept


def curve(rows: Rows) -> Figure:
    """Kept answers against the FLOPs cut: validation with intervals, held-out beside it, other recipes in grey."""
    figure, axis = canvas(11, 3.8)
    for number, recipe in enumerate(dict.fromkeys(row["recipe"] for row in rows if row["part"] == "choice")):
        mine = [row for row in rows if (row["part"], row["recipe"]) == ("choice", recipe)]
        style = "-o--o:o-.o"[2 * (number % 4) :][:2]
        axis.plot(_cuts(mine), _shares(mine), style, color=PALE, linewidth=1, markersize=3, label=f"choice: {recipe}")
    for part, colour, mark in (("validation", BLUE, "o-"), ("held-out", ORANGE, "D")):
        mine = [row for row in rows if row["part"] == part]
        axis.errorbar(_cuts(mine), _shares(mine), yerr=whiskers(mine), fmt=mark, color=colour, capsize=3, label=part)
    (chosen,) = (row for row in rows if row["part"] == "validation" and row["chosen"])
    ring = {"markerfacecolor": "none", "color": VERMILLION, "markersize": 15, "markeredgewidth": 2}
    axis.plot([chosen["flops_cut"]], [chosen["share"]], "o", **ring, label="chosen")
    axis.axhline(chosen["keep"], color=INK, linestyle="--", linewidth=1)
    axis.set(xlabel="share of the prefill's FLOPs that is saved", ylabel="own answers kept (95 % interval)")
    axis.set_xlim(0, None)
    top_legend(axis, columns=4)
    return figure


CURVE = Plot("tune", "Answers kept against FLOPs saved", "Dashed: the share to keep. A cut holds where the lower end "
             "of its validation interval is on or above it. Cuts were tested from the smallest upward, up to the first "
             "that fails.", curve_rows, curve, True)  # fmt: skip


def tuned_context(folder: Path, found: dict[str, Any], plots: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything the template tune.html names."""
    provenance = read_provenance(folder) or {}
    settings = read_config(folder)
    facts = [f"{name} {settings[name]}" for name in ("model", "prompts", "keep", "seed") if name in settings]
    rows = [row for row in curve_rows(found) if row["part"] != "choice"]
    return {
        "name": folder.resolve().name,
        "facts": [*facts, f"recipe: {found['recipe']}"],
        "verdict": found["sentences"][0],
        "cautions": [] if found["confirmed"] else ["Held-out prompts did not confirm the first choice."],
        "cards": [],
        "contents": [("curve", "Curve"), ("table", "Table"), ("origin", "Provenance")],
        "sentences": found["sentences"][1:],
        "columns": COLUMNS,
        "cells": [{"chosen": row["chosen"], "cells": cells(row)} for row in rows],
        "plots": plots,
        "origins": [{"stage": "tune", "provenance": provenance, "config": None}] if provenance else [],
        "story": None,
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    ends = "" if row["low"] is None else f" ({100 * row['low']:.1f} to {100 * row['high']:.1f}, {row['items']} answers)"
    speed = "" if row["speed"] is None else f"{row['speed']:.2f}"
    shares = [f"{row['flops_cut']:.1%}", f"{row['budget']:.1%}", f"{row['share']:.1%}{ends}", f"{row['first']:.1%}"]
    return [row["part"], *shares, f"{row['kl']:.4f}", speed]


def _cuts(rows: Rows) -> list[float]:
    return [row["flops_cut"] for row in rows]


def _shares(rows: Rows) -> list[float]:
    return [row["share"] for row in rows]
