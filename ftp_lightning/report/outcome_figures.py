"""The figures of evaluation and benchmark: rows (see `series`) in, matplotlib Figure out."""

import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ftp_lightning.report.figures import LOG, column, top_legend, whiskers
from ftp_lightning.report.series import Rows
from ftp_lightning.report.style import CYCLE, INK, METHOD_COLOURS, canvas, method_colour, plain_log
from ftp_lightning.report.wording import floor_kl_text, number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def method_axis(rows: Rows) -> tuple["Figure", Any]:
    """A figure whose y axis names the methods, the first on top; as high as their number asks."""
    figure, axis = canvas(5.4, 1.1 + 0.38 * len(rows))
    axis.set_yticks(range(len(rows)), column(rows, "label"))
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0)
    return figure, axis


def kept(rows: Rows) -> "Figure":
    """Share of the answers that need the prompt and are still right, with 95 % intervals."""
    figure, axis = method_axis(rows)
    colours = [method_colour(row["method"], index) for index, row in enumerate(rows)]
    axis.barh(range(len(rows)), column(rows, "share"), 0.66, color=colours, alpha=0.6)
    bars = {"fmt": "none", "ecolor": INK, "elinewidth": 1.4, "capsize": 3}
    axis.errorbar(column(rows, "share"), range(len(rows)), xerr=whiskers(rows), **bars)
    for index, row in enumerate(rows):
        end = row["share"] if row["high"] is None else row["high"]
        axis.annotate(percent(row["share"]), (end, index), (6, 0), textcoords="offset points", va="center")
    axis.set(xlim=(0, 1.17), xlabel="answers kept (share, 95 % interval)", xticks=[0, 0.25, 0.5, 0.75, 1])
    return figure


def kl(rows: Rows) -> "Figure":
    """Mean KL per continuation token (dot) and its 99th percentile (end of the line) beside the noise floor.

    Dots, not bars: the values span powers of ten, and on a logarithmic axis a bar's length means nothing. A mean of
    exactly 0 has no place on it: a hollow dot at the left edge.
    """
    figure, axis = method_axis(rows)
    values = [value for row in rows for value in (row["mean"], row["p99"]) if value > 0]
    edge = min(values, default=1.0) / 3
    for index, row in enumerate(rows):
        draw_kl(axis, index, row, edge)
    axis.set_xscale("log")
    axis.set_xlim(edge / 1.5, max(values, default=1.0) * 2)
    draw_floor(axis, rows[0]["noise_floor"], edge)
    low, high = axis.get_xlim()
    plain_log(axis.xaxis, decades=math.log10(high / low))
    axis.set_xlabel(f"KL to dense (nats per token, {LOG})")
    return figure


def draw_kl(axis: Any, index: int, row: dict[str, Any], edge: float) -> None:
    """One method: dot, line, tick, and the mean as a number."""
    colour = method_colour(row["method"], index)
    mean, p99 = max(row["mean"], edge), max(row["p99"], edge)
    axis.plot([mean, p99], [index, index], color=colour, linewidth=3, alpha=0.45, solid_capstyle="butt")
    axis.plot(mean, index, "o", color=colour, markersize=8, fillstyle="full" if row["mean"] > 0 else "none")
    axis.plot(p99, index, "|", color=colour, markersize=10, markeredgewidth=2)
    look = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
    axis.annotate(number(row["mean"]), (mean, index), (0, 8), **look)


def draw_floor(axis: Any, floor: float | None, edge: float) -> None:
    """The noise floor as a dashed line; in words where it lies more than two powers of ten left of every method."""
    if floor is None:
        return
    if floor < edge / 100:
        title = f"noise floor: {floor_kl_text(floor)}"
        axis.set_title(title if floor == 0 else f"{title}, left of this axis", loc="left", fontsize=8.5)
        return
    axis.axvline(floor, color=INK, linestyle="--", linewidth=1, label=f"noise floor  {number(floor)}")
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, floor / 1.5), max(high, floor * 2))
    top_legend(axis)


def kept_by_distance(rows: Rows) -> "Figure":
    """Share kept by how far back in the prompt the fact lies, with 95 % intervals; methods side by side."""
    figure, axis = canvas(11, 3.2)
    rows = [row for row in rows if row["items"]]
    distances, labels = (list(dict.fromkeys(column(rows, key))) for key in ("distance", "label"))
    for index, label in enumerate(labels):
        mine = [row for row in rows if row["label"] == label]
        shift = (index - (len(labels) - 1) / 2) * 0.6 / max(len(labels), 1)
        places = [distances.index(row["distance"]) + shift for row in mine]
        look = {"color": method_colour(mine[0]["method"], index), "marker": "osD^vP"[index % 6], "capsize": 2.5}
        axis.errorbar(places, column(mine, "share"), yerr=whiskers(mine), **look, linewidth=1.2, label=label)
    axis.set_xticks(range(len(distances)), distances)
    axis.set(ylim=(0, 1.03), ylabel="answers kept (share)", xlabel="distance of the fact from the question (tokens)")
    axis.grid(visible=False, axis="x")
    figure.legend(loc="outside right upper", handlelength=1.6)
    return figure


def pareto(rows: Rows) -> "Figure":
    """Answers kept against FLOPs saved; the line joins those that no other method beats in both."""
    figure, axis = canvas(11, 3.3)
    for index, row in enumerate(rows):
        colour = INK if row["method"] == "dense" else METHOD_COLOURS.get(row["method"], CYCLE[index % len(CYCLE)])
        look = {"color": colour, "marker": "osD^vP"[index % 6], "capsize": 3, "linestyle": "none"}
        axis.errorbar([row["flops_cut"]], [row["share"]], yerr=whiskers([row]), **look, label=row["label"], zorder=3)
    front = sorted((row["flops_cut"], row["share"]) for row in rows if row["best"])
    axis.plot(*zip(*front), color=INK, linewidth=1, linestyle="--", label="not beaten")
    axis.set(xlabel="FLOPs of the prompt saved (share)", ylabel="answers kept (share)", ylim=(0, 1.05))
    axis.set_xlim(left=0)
    figure.legend(loc="outside right upper", handlelength=1.6)
    return figure


LIMITS = {"shape_limit": ("blocks of that shape", (0, (5, 2))), "flops_limit": ("FLOPs", (0, (1, 1.6)))}
"""Column -> what sets the limit, and how its line is dashed."""


def speed(rows: Rows) -> "Figure":
    """Measured prefill speed-up beside its limits; a panel per batch and kv mode, a line per budget."""
    panels = sorted({(row["batch"], row["kv"]) for row in rows})
    budgets = sorted({round(row["budget"], 6) for row in rows})
    columns = min(len(panels), 4)
    lines = math.ceil(len(panels) / columns)
    figure, axes = canvas(11, 0.5 + 2.9 * lines, nrows=lines, ncols=columns, sharey=True, squeeze=False)
    for axis, panel in itertools.zip_longest(axes.flat, panels):
        if panel is None:
            axis.set_axis_off()
            continue
        mine = [row for row in rows if (row["batch"], row["kv"]) == panel]
        for index, budget in enumerate(budgets):
            draw_speed(axis, [row for row in mine if round(row["budget"], 6) == budget], budget, index)
        axis.axhline(1, color=INK, linewidth=1)
        axis.set_title(f"batch {panel[0]}, kv {panel[1]}", loc="right")
        axis.set_xlabel("prompt length (tokens, log scale)")
        length_axis(axis, sorted(set(column(mine, "length"))))
    for axis in axes[:, 0]:
        axis.set_ylabel("prefill speed-up\n(dense time / pruned time)")
    axes[0, 0].set_ylim(bottom=0)
    speed_legend(figure, axes.flat, rows)
    return figure


def draw_speed(axis: Any, rows: Rows, budget: float, index: int) -> None:
    """One budget: measured, and its limits, dashed."""
    rows = sorted(rows, key=lambda row: row["length"])
    if not rows:
        return
    look = {"color": CYCLE[index % len(CYCLE)], "marker": "osD^vP"[index % 6]}
    label = f"budget {percent(budget, 0)}, measured"
    axis.errorbar(
        column(rows, "length"), column(rows, "speedup"), yerr=whiskers(rows, "speedup"), **look, capsize=3, label=label
    )
    for name, (_, dashes) in LIMITS.items():
        there = [row for row in rows if row.get(name) is not None]
        limit = {**look, "markerfacecolor": "none", "markersize": 3.5, "linestyle": dashes, "linewidth": 1.1}
        axis.plot(column(there, "length"), column(there, name), **limit)


def speed_legend(figure: "Figure", axes: Iterable[Any], rows: Rows) -> None:
    """Budgets by their colours, limits by their dashes; above the panels."""
    from matplotlib.lines import Line2D

    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    handles, labels = list(found.values()), list(found)
    for name, (what, dashes) in LIMITS.items():
        if any(row.get(name) is not None for row in rows):
            handles.append(Line2D([], [], color=INK, linestyle=dashes, linewidth=1.3))
            labels.append(f"limit: {what}")
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 6), handlelength=2.6)


def length_axis(axis: Any, lengths: list[int]) -> None:
    """Lengths are powers of two or nearly: equal steps for equal factors, a tick at each measured length."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.minorticks_off()
