"""One function per figure: rows (see `series`) in, matplotlib Figure out. Call them inside `style.house_style`."""

import math
from typing import TYPE_CHECKING, Any

from ftp_lightning.report.series import OTHER_START, START, Rows
from ftp_lightning.report.style import BLUE, CYCLE, INK, LINES, ORANGE, PALE, canvas, plain_log
from ftp_lightning.report.wording import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def column(rows: Rows, name: str) -> list[Any]:
    """One column of the rows."""
    return [row[name] for row in rows]


def whiskers(rows: Rows, value: str = "share") -> list[list[float]]:
    """Lengths below and above `value` of the interval [low, high], as matplotlib's xerr and yerr want them; 0 where
    there is no interval."""
    ends = [(row[value] if row[end] is None else row[end] for row in rows) for end in ("low", "high")]
    return [
        [max(row[value] - low, 0) for row, low in zip(rows, ends[0])],
        [max(high - row[value], 0) for row, high in zip(rows, ends[1])],
    ]


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


HATCH = {"hatch": "////", "edgecolor": "white", "linewidth": 0}
"""How a block looks whose skipped tokens leave no keys and values."""


def schedules(rows: Rows) -> "Figure":
    """Sparsity per block: static search, after fine-tuning, and what the evaluation realised.

    Of a schedule with several kv modes the blocks that evict are hatched.
    """
    figure, axis = canvas(11, 3.1)
    bars = [name for name in ("static_search", "fine_tuned") if name in rows[0]]
    names = {"static_search": ("static search", ORANGE), "fine_tuned": ("fine-tuned with the router", BLUE)}
    width, hatched = 0.8 / len(bars), False
    for index, name in enumerate(bars):
        places = [row["block"] + (index - (len(bars) - 1) / 2) * width for row in rows]
        label, colour = names[name]
        axis.bar(places, column(rows, name), width * 0.94, color=colour, label=label)
        evicting = [(place, row[name]) for place, row in zip(places, rows) if row.get(f"{name}_kv") == "evict"]
        if 0 < len(evicting) < len(rows):
            axis.bar(*zip(*evicting), width * 0.94, color="none", **HATCH)
            hatched = True
    if "realised" in rows[0]:
        blocks = [row["block"] + (len(bars) - 1) / 2 * width for row in rows]
        axis.plot(blocks, column(rows, "realised"), "D", **DIAMOND, label="realised in the evaluation")
    last = column(rows, bars[-1])
    axis.axhline(sum(last) / len(last), color=INK, linestyle="--", linewidth=1, label="budget (mean)")
    axis.set(ylim=(0, 1), ylabel="sparsity (share of tokens skipped)")
    block_axis(axis, len(rows))
    if hatched:
        axis.bar([0], [0], color=PALE, **HATCH, label="hatched: evict, else keep")
    top_legend(axis, columns=5)
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
