"""Draw docs/pictures/pareto.png: what SmolLM2 keeps against the time to its first token, other methods beside.

    python docs/pareto.py

The rows are published: experiments/found/record.jsonl.xz and record_times.jsonl.xz (docs/record.md), and the rival
methods of real_models.jsonl.xz (docs/real_models.md), which were asked other questions of the same kinds. Filled marks
stand at the measured time of 1,024 tokens; hollow ones, whose time was not measured, at what their FLOPs allow.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from ftp_lightning.evaluation.record import kept, mean
from ftp_lightning.evaluation.statistics import Interval
from ftp_lightning.studies.grid import unpack

FOUND = Path(__file__).parents[1] / "experiments" / "found"
PICTURE = Path(__file__).parent / "pictures" / "pareto.png"
MODEL, TOKENS = "smollm2-135m-instruct", 1024
READY = {f"{MODEL} at {budget}": None for budget in ("0.133333", "0.233333", "0.333333", "0.433333")}
FITTED = "12,14,18,20-29 fitted 36"
SAME_WORK = {FITTED: f"{MODEL} at 0.433333"}
"""Fitted maps cost what distilled ones of the same blocks and rank do."""
OURS = {
    FITTED: ("the same blocks, fitted maps", "#56b4e9", "D"),
    "17-29": ("late blocks, no maps", "#7f7f7f", "v"),
}
RIVALS = {
    "default": ("default schedule, no training", "#009e73", "s"),
    "late_blocks": ("late blocks, no maps", "#7f7f7f", "v"),
    "first_dense": ("first block dense, rest even", "#f0c000", "P"),
    "fast_kv": ("FastKV", "#cc79a7", "^"),
    "gem_filter": ("GemFilter", "#d55e00", "X"),
    "deletion_recent": ("deletion of the oldest tokens", "#e69f00", "o"),
}
PANELS = (
    ("numbers found again in 1,000 tokens, % of 19 or 20", ("needles-900-1000", "ruler_niah_multikey")),
    ("KL per token of its own answers (log scale)", ("own", "own_answers")),
)


def rows(name: str) -> pd.DataFrame:
    """The items of SmolLM2 in a packed file, with the task that their cell is about."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(FOUND / f"{name}.jsonl.xz", Path(folder))
        files = sorted(Path(folder).glob(f"{MODEL}-*.jsonl"))
        tables = [pd.read_json(file, lines=True).assign(cell=file.stem) for file in files if file.stat().st_size]
    return pd.concat(tables, ignore_index=True)


def place(items: pd.DataFrame, times: pd.DataFrame, timed: str) -> tuple[float, float, float, bool]:
    """Times as fast as dense with its interval, and whether that was measured; else the limit of the FLOPs."""
    found = times[times["method"] == timed]
    if len(found):
        return (*found.iloc[0][["speedup", "low", "high"]], True)
    limit = items["dense_flops"].sum() / items["flops"].sum()
    return limit, limit, limit, False


def height(items: pd.DataFrame, panel: int) -> Interval:
    return kept(items).scaled(100) if panel == 0 else mean(items, "kl")


def mark(axes, items: pd.DataFrame, panel: int, where: tuple, label: str, colour: str, shape: str) -> None:
    """One method: its mark, and thin lines to the ends of both intervals."""
    (x, low, high, measured), found = where, height(items, panel)
    axes.plot(x, found.value, shape, color=colour, markerfacecolor=colour if measured else "white", markersize=7,
              markeredgewidth=1.6, label=label, zorder=3)  # fmt: skip
    axes.hlines(found.value, low, high, color=colour, linewidth=1, alpha=0.6)
    if panel == 1:
        axes.vlines(x, found.low, found.high, color=colour, linewidth=1, alpha=0.6)


def main() -> None:
    record, real, times = rows("record"), rows("real_models"), rows("record_times")
    record = record[~record["cell"].str.contains("-validation-")]
    real = real[real["cell"].str.contains("-0.2-")]  # the cut of all rivals here
    times = times[times["cell"].str.startswith(f"{MODEL}-{TOKENS}-")].assign(
        method=lambda found: found["cell"].str.removeprefix(f"{MODEL}-{TOKENS}-").str.replace("_at_", " at ")
    )
    figure, both = plt.subplots(1, 2, figsize=(10, 4.4), dpi=130)
    for panel, (axes, (title, (ours, theirs))) in enumerate(zip(both, PANELS, strict=True)):
        line = []
        for method in READY:
            items = record[(record["method"] == method) & (record["task"] == ours)]
            where = place(items, times, method)
            mark(axes, items, panel, where, "", "#0072b2", "o")
            line.append((where[0], height(items, panel).value))
        axes.plot(*zip(*line, strict=True), color="#0072b2", linewidth=2.4, label="ready-made pruner: 12, 21, 31, 40 %")
        for method, about in OURS.items():
            items = record[(record["method"] == method) & (record["task"] == ours)]
            mark(
                axes, items, panel, place(items, times, SAME_WORK.get(method, method)), f"{about[0]}, 40 %", *about[1:]
            )
        for method, about in RIVALS.items():
            items = real[(real["method"] == method) & real["cell"].str.contains(f"-{theirs}-") & real["kl"].notna()]
            items = items if panel else real[(real["method"] == method) & (real["task"] == theirs)]
            if len(items):
                mark(axes, items, panel, place(items, times, f"{method}_to_0.2"), f"{about[0]}, 20 %", *about[1:])
        axes.axvline(1.0, color="#bbbbbb", linewidth=1)
        axes.set(title=title, xlabel=f"prefill of {TOKENS:,} tokens, times as fast as dense")
        axes.title.set(fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    both[0].set_ylim(-4, 104)
    both[1].set(yscale="log", ylim=(1.5, 0.0025))
    both[1].set_yticks(
        [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0], labels="0.005 0.01 0.02 0.05 0.1 0.2 0.5 1".split()
    )
    both[1].minorticks_off()
    handles, labels = both[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8.5, ncol=3, loc="lower center")
    told = "SmolLM2-135M. Up and to the right is better. Filled: measured time. Hollow: what the FLOPs allow"
    figure.suptitle(told, fontsize=10.5, x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
