"""One function per figure: rows (see `series`) in, matplotlib Figure out. Call them inside `style.house_style`."""

import math
from typing import TYPE_CHECKING, Any

from ftp_lightning.report.series import OTHER_START, START, Rows
from ftp_lightning.report.style import BLUE, CYCLE, GREEN, INK, LINES, ORANGE, PALE, PURPLE, canvas, plain_log
from ftp_lightning.report.tables import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def column(rows: Rows, name: str) -> list[Any]:
    """One column of the rows."""
    return [row[name] for row in rows]


def whiskers(rows: Rows, value: str = "share") -> list[list[float]]:
    """Lengths below and above `value` of the interval [low, high], as matplotlib's xerr and yerr want them."""
    return [[max(row[value] - row["low"], 0) for row in rows], [max(row["high"] - row[value], 0) for row in rows]]


def block_axis(axis: Any, count: int) -> None:
    """Block numbers 1 .. count, at most about 16 of them written; no vertical grid."""
    axis.set(xlabel="block", xlim=(0.4, count + 0.6), xticks=range(1, count + 1, math.ceil(count / 16)))
    axis.grid(visible=False, axis="x")


def kl_scale(axis: Any, values: list[float]) -> None:
    """A logarithmic y axis that still shows an exact 0, as the last block under kv = keep has it: linear near 0."""
    positive = [value for value in values if value > 0]
    if positive:
        least = max(min(positive), max(positive) * 1e-5)
        axis.set_yscale("symlog", linthresh=least, linscale=0.3)
        ticks = [0.0, *round_numbers(least, max(positive))]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_yticks([], minor=True)
    axis.set_ylim(bottom=0)


def round_numbers(least: float, most: float) -> list[float]:
    """The powers of ten in [least, most]; below two decades also 2 and 5 times these."""
    steps = (1, 2, 5) if most / least < 100 else (1,)
    exponents = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    return [number for e in exponents for step in steps if least <= (number := float(f"{step}e{e}")) <= most]


def top_legend(axis: Any, columns: int = 4, **options: Any) -> None:
    """The legend above the axes, where it hides no data."""
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    axis.legend(**place, ncols=columns, handlelength=1.6, columnspacing=1.4, **options)


LOG = "log scale: no zero"
"""What an axis says of itself that does not show its zero."""

DIAMOND = {"color": INK, "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.8, "clip_on": False}


def schedules(rows: Rows) -> "Figure":
    """Sparsity per block: static search, after fine-tuning, and what the evaluation realised."""
    figure, axis = canvas(11, 3.1)
    bars = [name for name in ("static_search", "fine_tuned") if name in rows[0]]
    names = {"static_search": ("static search", ORANGE), "fine_tuned": ("fine-tuned with the router", BLUE)}
    width = 0.8 / len(bars)
    for index, name in enumerate(bars):
        places = [row["block"] + (index - (len(bars) - 1) / 2) * width for row in rows]
        label, colour = names[name]
        axis.bar(places, column(rows, name), width * 0.94, color=colour, label=label)
    if "realised" in rows[0]:
        blocks = [row["block"] + (len(bars) - 1) / 2 * width for row in rows]
        axis.plot(blocks, column(rows, "realised"), "D", **DIAMOND, label="realised in the evaluation")
    last = column(rows, bars[-1])
    axis.axhline(sum(last) / len(last), color=INK, linestyle="--", linewidth=1, label="budget (mean)")
    axis.set(ylim=(0, 1), ylabel="sparsity (share of tokens skipped)")
    block_axis(axis, len(rows))
    top_legend(axis)
    return figure


def sensitivity(rows: Rows) -> "Figure":
    """KL when one block alone skips tokens, one curve per share skipped."""
    figure, axis = canvas()
    levels = [name for name in rows[0] if name != "block"]
    for level, colour, marker in zip(levels, CYCLE * len(levels), "osD^vP" * len(levels)):
        axis.plot(column(rows, "block"), column(rows, level), marker + "-", color=colour, label=level, clip_on=False)
    kl_scale(axis, [row[level] for row in rows for level in levels])
    axis.set_ylabel("KL to dense (nats per token)\nlog scale, linear near 0")
    block_axis(axis, len(rows))
    top_legend(axis, columns=3)
    return figure


def influence(rows: Rows) -> "Figure":
    """Block Influence, and the share of tokens that a block hardly turns."""
    shares = [name for name in rows[0] if name.startswith("cosine")]
    figure, axes = canvas(nrows=2 if shares else 1, sharex=True, squeeze=False)
    axes[0, 0].bar(column(rows, "block"), column(rows, "block_influence"), 0.75, color=BLUE)
    axes[0, 0].set_ylabel("Block Influence\n1 - cos(in, out)")
    for name, colour in zip(shares, CYCLE[1:] * len(shares)):
        axes[1, 0].plot(column(rows, "block"), column(rows, name), "o-", color=colour, label=f"{name}")
        axes[1, 0].set(ylabel="share of tokens", ylim=(0, 1.05))
        axes[1, 0].legend(loc="best")
    for axis in axes[:, 0]:
        block_axis(axis, len(rows))
        axis.label_outer()
    return figure


def convergence(rows: Rows) -> "Figure":
    """Best and mean KL of each generation against tokens spent; allocations and starts as horizontal marks.

    An allocation's look follows its place in the list, so it is the same in the search and in the fine-tuning.
    """
    figure, axis = canvas(5.4, 3.7)
    best, mean = ([row for row in rows if row["series"] == name] for name in ("best", "mean"))
    axis.plot(column(mean, "forward_tokens"), column(mean, "kl"), color=PALE, linewidth=1, label="population mean")
    label = f"best  {number(best[-1]['kl'])}" if best else "best"
    axis.step(column(best, "forward_tokens"), column(best, "kl"), where="post", color=BLUE, linewidth=2.4, label=label)
    marks = [row for row in rows if row["series"] not in ("best", "mean")]
    for index, row in enumerate(marks):
        look = {"color": CYCLE[1:][index % 5], "linestyle": LINES[1:][index % 3], "linewidth": 1.3}
        if row["series"] in (START, OTHER_START):
            look = {"color": INK, "linestyle": (0, (1, 1.5)), "linewidth": 1.6}
        axis.axhline(row["kl"], **look, label=f"{row['series']}  {number(row['kl'])}")
    kl_scale_to_range(axis, column(rows, "kl"))
    axis.set_xlabel("forward tokens spent")
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(si_formatter())
    figure.legend(loc="outside lower left", ncols=3, handlelength=1.6, columnspacing=1.2)
    return figure


def kl_scale_to_range(axis: Any, values: list[float]) -> None:
    """Logarithmic where every value allows it: a search moves within one or two powers of ten."""
    axis.set_ylabel("KL to dense (nats per token)")
    if min(values) > 0:
        axis.set_yscale("log")
        axis.set_ylim(min(values) * 0.8, max(values) * 1.2)
        axis.set_ylabel(f"KL to dense (nats per token)\n{LOG}")
        plain_log(axis.yaxis, math.log10(max(values) / min(values)))


def si_formatter() -> Any:
    """12000 -> 12 k."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep=" ")


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
