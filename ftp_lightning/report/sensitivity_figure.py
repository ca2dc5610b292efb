"""All that stage `sensitivity` found in one figure of small panels. Draw it inside `style.house_style`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftp_lightning.report.figures import block_axis, kl_scale, top_legend
from ftp_lightning.report.style import BLUE, CYCLE, GREEN, LINES, PALE, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vP"

UNEVEN = "prompts differ in length"


def overview(found: dict[str, Any]) -> Figure:
    """Six panels over the blocks of a `sensitivity.json`: what a block changes, which tokens it hardly changes and
    whether these stand at the same positions, what the loss says, what pruning the block alone costs."""
    figure, axes = canvas(11.5, 6.2, nrows=2, ncols=3, sharex=True)
    panels = (_influence, _redundancy, _overlap, _gradient, _explained, _kl)
    for draw, axis in zip(panels, axes.flat, strict=True):
        block_axis(axis, found["num_blocks"])
        draw(axis, found, range(1, found["num_blocks"] + 1))
    for axis in axes[0]:
        axis.set_xlabel("")
    return figure


def _influence(axis: Any, found: dict, blocks: range) -> None:
    axis.bar(blocks, found["block_influence"], 0.75, color=BLUE)
    axis.set_title("Block Influence", pad=20)
    axis.set(ylabel="1 - cos(in, out)", ylim=(0, None))


def _gradient(axis: Any, found: dict, blocks: range) -> None:
    axis.set_title("Gradient of a token's gate", pad=20)
    axis.set_ylabel("mean |dL/dg| (nats)")
    if "gradient" in found:
        axis.bar(blocks, found["gradient"], 0.75, color=GREEN)
        axis.set_ylim(0, None)
    else:
        _absent(axis, "not measured")


def _absent(axis: Any, why: str) -> None:
    axis.text(0.5, 0.5, why, transform=axis.transAxes, ha="center")


def _redundancy(axis: Any, found: dict, blocks: range) -> None:
    for look, (threshold, shares) in _by_threshold(found["redundancy"]):
        axis.plot(blocks, shares, **look, label=f"> {threshold}")
    axis.set(ylabel="share with cosine > threshold", ylim=(0, 1.02))
    _named(axis, "Redundant tokens")


def _overlap(axis: Any, found: dict, blocks: range) -> None:
    """Solid: pooled Jaccard; dotted: as many tokens anywhere."""
    axis.set_title("Same positions in two texts?", pad=20)
    if "position" not in found:
        return _absent(axis, UNEVEN)
    for look, (threshold, measured) in _by_threshold(found["position"]):
        axis.plot(blocks, _numbers(measured["jaccard"]), **look, label=f"> {threshold}")
        axis.plot(blocks, _numbers(measured["jaccard_by_chance"]), ":", color=look["color"], linewidth=1.2)
    axis.plot([], [], ":", color=PALE, linewidth=1.2, label="by chance")
    axis.set(ylabel="pooled Jaccard index", ylim=(0, 1.02))
    _named(axis, "Same positions in two texts?")


def _explained(axis: Any, found: dict, blocks: range) -> None:
    values = [0.0]
    axis.set_title("Redundancy that position alone explains", pad=20)
    if "position" not in found:
        return _absent(axis, UNEVEN)
    for look, (threshold, measured) in _by_threshold(found["position"]):
        explained = _numbers(measured["explained"])
        axis.plot(blocks, explained, **look, label=f"> {threshold}")
        values += [value for value in explained if value == value]
    axis.set(ylabel="share of variance (adjusted R²)", ylim=(min(values) - 0.02, 1.02))
    _named(axis, "Redundancy that position alone explains")


def _kl(axis: Any, found: dict, blocks: range) -> None:
    """Colour: sparsity; line: kv mode, where there are several."""
    several = len(found["kl_by_kv"]) > 1
    for (kv, rows), line in zip(found["kl_by_kv"].items(), LINES):
        for level, column, colour, marker in zip(found["levels"], zip(*rows), CYCLE * 9, MARKERS * 9):
            look = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4}
            axis.plot(blocks, column, **look, label=f"{level:.0%}" if line == "-" else None, clip_on=False)
        if several:
            axis.plot([], [], line, color=PALE, label=kv)
    kl_scale(axis, [kl for rows in found["kl_by_kv"].values() for row in rows for kl in row])
    axis.set_ylabel("KL to dense (nats per token)")
    _named(axis, f"One block alone skips ({found['router']}{'' if several else ', ' + found['kv']})")


def _by_threshold(values: dict[str, Any]) -> Any:
    """A look for each threshold, the same in every panel."""
    looks = ({"color": c, "marker": m, "markersize": 4, "clip_on": False} for c, m in zip(CYCLE * 9, MARKERS * 9))
    return zip(looks, values.items())


def _numbers(values: list[float | None]) -> list[float]:
    """None, which is not defined, as NaN, which is not drawn."""
    return [float("nan") if value is None else value for value in values]


def _named(axis: Any, title: str) -> None:
    """Title above the legend, the legend above the axes."""
    top_legend(axis, columns=5, handletextpad=0.4, fontsize=8)
    axis.set_title(title, pad=20)
