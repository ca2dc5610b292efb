"""The figures of the router's training: rows (see `series`) in, matplotlib Figure out."""

from typing import TYPE_CHECKING, Any

from ftp_lightning.report.figures import DIAMOND, block_axis, column, top_legend
from ftp_lightning.report.series import Rows
from ftp_lightning.report.style import BLUE, GREEN, ORANGE, PURPLE, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def running_mean(values: list[float], width: int) -> list[float]:
    """mean(values[max(0, i - width + 1) .. i]): looks back only, so the curve never knows its future."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    starts = [max(0, end - width) for end in range(1, len(values) + 1)]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]


def losses(rows: Rows) -> "Figure":
    """The three losses, each on its own scale, and the guide: every step faintly, the running mean boldly."""
    figure, axes = canvas(11, 2.9, ncols=4)
    for axis, name, colour in zip(axes, ("distillation", "sparsity", "guide"), (BLUE, ORANGE, GREEN)):
        smooth_curve(axis, rows, name, colour)
        axis.set(title=f"{name} loss")
    smooth_curve(axes[3], rows, "agreement", PURPLE, label="agreement")
    axes[3].plot(column(rows, "step"), column(rows, "guide_weight"), "--", color=GREEN, label="guide weight")
    axes[3].set(title="agreement with the static router")
    axes[3].legend(loc="best")
    for axis in axes:
        axis.set(xlabel="training step", ylim=(0, None))
    return figure


def weighted(rows: Rows) -> "Figure":
    """The weighted losses as they are added up, stacked: which of them is minimised."""
    figure, axis = canvas()
    names = ("distillation", "sparsity", "guide")
    width = max(1, len(rows) // 20)
    values = [running_mean(column(rows, name), width) for name in names]
    shades = {"colors": (BLUE, ORANGE, GREEN), "alpha": 0.75, "linewidth": 0}
    axis.stackplot(column(rows, "step"), values, labels=names, **shades)
    axis.set(xlabel="training step", ylabel="weight x loss", ylim=(0, None), xlim=(0, rows[-1]["step"]))
    top_legend(axis)
    return figure


def smooth_curve(axis: Any, rows: Rows, name: str, colour: str, label: str | None = None) -> None:
    """Every step, and over it the running mean over 5 % of the steps."""
    steps, values = column(rows, "step"), column(rows, name)
    axis.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
    axis.plot(steps, running_mean(values, max(1, len(rows) // 20)), color=colour, label=label)


def validation(rows: Rows) -> "Figure":
    """KL on validation windows while training."""
    figure, axis = canvas()
    axis.plot(column(rows, "step"), column(rows, "kl"), "o-", color=BLUE)
    axis.set(xlabel="training step", ylabel="KL to dense\n(nats per token)", ylim=(0, None))
    return figure


def target_and_soft(rows: Rows) -> "Figure":
    """What the schedule asks of the router, what its probabilities say, and what it did."""
    figure, axis = canvas()
    blocks = column(rows, "block")
    if "soft" in rows[0]:
        axis.bar(blocks, column(rows, "soft"), 0.75, color=BLUE, label="soft: 1 - mean p(compute)")
    edges = [block - 0.45 for block in blocks], [block + 0.45 for block in blocks]
    axis.hlines(column(rows, "target"), *edges, color=ORANGE, linewidth=2.6, label="target")
    if "realised" in rows[0]:
        axis.plot(blocks, column(rows, "realised"), "D", **DIAMOND, label="realised")
    axis.set(ylim=(0, 1), ylabel="sparsity (share of tokens)")
    block_axis(axis, len(rows))
    top_legend(axis, columns=3)
    return figure
