"""Figures over blocks that go beyond one curve: gates of every token, target against realised, gradient, positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftp_lightning.report.figures import block_axis, column, top_legend
from ftp_lightning.report.style import BLUE, CYCLE, GREEN, INK, ORANGE, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ftp_lightning.report.series import Rows

MARKERS = "osD^vP"


def gates(rows: Rows) -> Figure:
    """Tokens x blocks: a filled cell is computed, an empty one skipped. Above it, how many blocks took each token.

    Each block is one path of rectangles, one per run of computed tokens: small, and sharp at any size.
    """
    names = [name for name in rows[0] if name.startswith("block_")]
    figure, (above, axis) = canvas(
        11, 1.9 + 0.14 * len(names), nrows=2, sharex=True, gridspec_kw={"height_ratios": [1, 0.35 * len(names) ** 0.8]}
    )
    above.step([row["token"] for row in rows], column(rows, "computed_by"), where="mid", color=INK, linewidth=1)
    above.set(ylabel="blocks", ylim=(0, len(names) + 0.5))
    for block, name in enumerate(names, start=1):
        draw_runs(axis, block, runs(column(rows, name)))
    last = rows[-1]["token"]
    axis.set(xlabel="token of the text (1 = first)", ylabel="block", xlim=(0.5, last + 0.5))
    axis.set_ylim(len(names) + 0.6, 0.4)
    axis.set_yticks(range(1, len(names) + 1, -(-len(names) // 12)))
    axis.grid(visible=False)
    return figure


def runs(keep: list[int]) -> list[tuple[int, int]]:
    """(first, length) of every run of ones; first counts from 1."""
    found: list[tuple[int, int]] = []
    for place, kept in enumerate(keep, start=1):
        if not kept:
            continue
        if found and sum(found[-1]) == place:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((place, 1))
    return found


def draw_runs(axis: Any, block: int, spans: list[tuple[int, int]]) -> None:
    """The runs of one block as one path."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    boxes = [
        Path([(x - 0.5, block - 0.4), (x + n - 0.5, block - 0.4), (x + n - 0.5, block + 0.4), (x - 0.5, block + 0.4),
              (x - 0.5, block - 0.4)], closed=True)
        for x, n in spans
    ]  # fmt: skip
    if boxes:
        axis.add_patch(PathPatch(Path.make_compound_path(*boxes), facecolor=BLUE, linewidth=0))


def realised(rows: Rows) -> Figure:
    """Bars: share of tokens that skipped; marks: what the schedule asks. Below, their difference on its own scale."""
    figure, (axis, below) = canvas(11, 3.9, nrows=2, sharex=True, gridspec_kw={"height_ratios": [2, 1]})
    blocks = column(rows, "block")
    axis.bar(blocks, column(rows, "realised"), 0.75, color=BLUE, label="realised in the evaluation")
    draw_targets(axis, rows)
    axis.set(ylim=(0, 1), ylabel="sparsity\n(share of tokens)")
    top_legend(axis)
    differences = column(rows, "difference")
    below.bar(blocks, differences, 0.75, color=GREEN)
    below.axhline(0, color=INK, linewidth=0.8)
    reach = max(0.02, max(map(abs, differences)) * 1.15)
    below.set(ylabel="realised\n- target", ylim=(-reach, reach))
    block_axis(axis, len(rows))
    block_axis(below, len(rows))
    axis.set_xlabel("")
    return figure


def draw_targets(axis: Any, rows: Rows) -> None:
    """The target of every block as a mark across its bar."""
    edges = [row["block"] - 0.45 for row in rows], [row["block"] + 0.45 for row in rows]
    axis.hlines(column(rows, "target"), *edges, color=ORANGE, linewidth=2.6, label="target", clip_on=False)


def gradient(rows: Rows) -> Figure:
    """What the continuation's loss says of a token's gate in each block."""
    figure, axis = canvas(5.4, 4.2)
    axis.bar(column(rows, "block"), column(rows, "gradient"), 0.75, color=GREEN)
    axis.set(ylabel="mean |dL/dg| (nats)", ylim=(0, None))
    block_axis(axis, len(rows))
    return figure


def positions(rows: Rows) -> Figure:
    """Above: overlap of two texts' redundant positions, dotted what chance gives. Below: what position explains."""
    figure, (above, below) = canvas(5.4, 4.2, nrows=2, sharex=True)
    levels = [name.removeprefix("same") for name in rows[0] if name.startswith("same")]
    explained = [0.0]
    for level, colour, marker in zip(levels, CYCLE * len(levels), MARKERS * len(levels)):
        look = {"color": colour, "marker": marker, "markersize": 4, "clip_on": False}
        blocks = column(rows, "block")
        above.plot(blocks, numbers(rows, f"same{level}"), **look, label=f"cosine{level}")
        above.plot(blocks, numbers(rows, f"chance{level}"), ":", color=colour, linewidth=1.2)
        below.plot(blocks, numbers(rows, f"explained{level}"), **look)
        explained += [value for value in numbers(rows, f"explained{level}") if value == value]
    above.plot([], [], ":", color=INK, linewidth=1.2, label="by chance")
    above.set(ylabel="Jaccard index", ylim=(0, 1.02))
    top_legend(above, columns=4, handletextpad=0.4, fontsize=8)
    below.set(ylabel="share of variance\n(adjusted R²)", ylim=(min(explained) - 0.02, 1.02))
    block_axis(above, len(rows))
    block_axis(below, len(rows))
    above.set_xlabel("")
    return figure


def numbers(rows: Rows, name: str) -> list[float]:
    """A column in which None, which is not defined, is NaN, which is not drawn."""
    return [float("nan") if value is None else value for value in column(rows, name)]
