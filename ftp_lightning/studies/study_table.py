"""What the runs of a study say together: a table, a figure, and the sentence of what changed by more than its
interval."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftp_lightning.products import read_product
from ftp_lightning.report.study import is_sure
from ftp_lightning.report.wording import number, percent, signed
from ftp_lightning.whole_files import write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ftp_lightning.studies.trial import TrialStage

TABLE, PRODUCTS = "table.md", ("study.json", "table.md", "study.csv", "study.png")
MEASURES = {"kl": "KL", "kept": "answers kept, points"}


def write_study(
    folder: Path, question: str, trials: Sequence[TrialStage], pairs: Sequence[tuple[str, str]] = ()
) -> None:
    """study.json, table.md, study.csv and study.png of the finished runs; the first row is what others are held
    against, and `pairs` are (label, label of the row that it is held against, too): where there are some the sentence
    begins with them."""
    runs = [(trial, read_product(trial.folder, "results.json")) for trial in trials]
    labels: list[Any] = list(dict.fromkeys(trial.label for trial in trials))
    groups = {label: [(trial, found) for trial, found in runs if trial.label == label] for label in labels}
    rows = [summary(label, group) for label, group in groups.items()]
    compared = [compare(label, groups[label], groups[labels[0]]) for label in labels[1:]]
    said = sentence(labels[0], compared) if labels else "No run is finished."
    study = {"question": question, "rows": rows, "compared": compared, "sentence": said}
    known = [(label, other) for label, other in pairs if label in groups and other in groups]
    alike = [compare(label, groups[label], groups[other]) | {"against": other} for label, other in known]
    if alike:
        first = changes("the row that is alike but for the last parameter", alike)
        study |= {"pairs": alike, "sentence": f"{first} {said}"}
    write_text(folder / "study.json", json.dumps(study, indent=1) + "\n")
    write_text(folder / TABLE, table(study))
    write_text(folder / "study.csv", points(rows))
    if rows:
        write_bytes(folder / "study.png", picture(rows))


def summary(label: str, group: list[tuple[TrialStage, dict[str, Any]]]) -> dict[str, Any]:
    """One row: of each measure a value per seed. `kept` is None where dense answers nothing that needs the passage."""
    found = [result for _, result in group]
    return {
        "label": label,
        "quoted": group[0][0].quoted,
        "seeds": [trial.seed for trial, _ in group],
        "kl": [one["kl"] for one in found],
        "kept": [one["kept"]["share"] for one in found],
        "answers": sum(one["kept"]["items"] for one in found),
        "realised_sparsity": [one["realised_sparsity"] for one in found],
        "flops_reduction": [one["flops_reduction"] for one in found],
        "parameters": found[0]["parameters"],
    }


def compare(label: str, group: list, reference: list) -> dict[str, Any]:
    """Row minus reference, paired by seed and item: measure -> difference and 95 % interval over seeds and documents.

    Items are those of the seeds that both have; a measure is None where no item is left.
    """
    theirs = {trial.seed: found for trial, found in reference}
    pairs = [(trial.seed, found, theirs[trial.seed]) for trial, found in group if trial.seed in theirs]
    kl = [
        (a, b, document, seed)
        for seed, x, y in pairs
        for a, b, document in zip(x["kl_rows"], y["kl_rows"], documents(x, "kl_rows", seed), strict=True)
    ]
    kept = [
        (float(a), float(b), document, seed)
        for seed, x, y in pairs
        for a, b, needed, document in zip(x["right"], y["right"], y["need"], documents(x, "right", seed), strict=True)
        if needed
    ]
    return {"label": label, "kl": interval(kl), "kept": interval(kept, 100.0)}


def documents(found: dict[str, Any], rows: str, seed: int) -> Sequence[Any]:
    """Whose item each of these rows is. All seeds read the same documents; a run that names none counts every item of
    every seed as one."""
    return found.get("documents", {}).get(rows) or [(seed, place) for place in range(len(found[rows]))]


def interval(items: list[tuple[float, float, Any, int]], scale: float = 1.0) -> dict[str, Any] | None:
    """A minus B of (A, B, document, seed): the difference, its 95 % interval, and `by_seed` the difference in each."""
    from ftp_lightning.evaluation.statistics import paired

    if not items:
        return None
    found = paired(*map(list, zip(*items, strict=True))).scaled(scale)
    by_seed: dict[int, list[float]] = {}
    for a, b, _, seed in items:
        by_seed.setdefault(seed, []).append(scale * (a - b))
    means = [statistics.fmean(values) for values in by_seed.values()]
    return {"difference": found.value, "low": found.low, "high": found.high, "by_seed": means}


def sentence(reference: str, compared: list[dict[str, Any]]) -> str:
    """What changed against the row of this label by more than its interval, or that nothing did."""
    return changes(f"“{reference}”", compared)


def changes(reference: str, compared: list[dict[str, Any]]) -> str:
    """As `sentence`, against whatever the words of `reference` say."""
    parts = []
    for one in compared:
        sure = [(name, one[name]) for name in MEASURES if is_sure(one[name])]
        if sure:
            parts.append(f"{one['label']}: " + ", ".join(f"{MEASURES[name]} {interval_text(i)}" for name, i in sure))
    if not parts:
        return f"Against {reference} nothing changed by more than its interval."
    return f"Against {reference} these changed by more than their interval: " + "; ".join(parts) + "."


def interval_text(found: dict[str, Any] | None) -> str:
    """ "+0.012 [+0.004, +0.020]"."""
    if found is None:
        return ""
    if found["low"] is None:
        return signed(found["difference"])
    difference, *ends = (signed(found[key]) for key in ("difference", "low", "high"))
    return f"{difference} [{', '.join(ends)}]"


def table(study: dict[str, Any]) -> str:
    """Markdown: question, rows with mean ± std over seeds, differences with their intervals, sentence."""
    quoted = any(row["quoted"] is not None for row in study["rows"])
    heads = ["", "seeds", "KL", "kept, %", "answers", "realised", "FLOPs cut", "parameters"]
    heads += ["KL - first", "kept - first, points"] + ["paper, %"] * quoted
    compared = {one["label"]: one for one in study["compared"]}
    lines = [study["question"], "", _line(heads), _line(["---"] * len(heads))]
    for row in study["rows"]:
        other = compared.get(row["label"], {"kl": None, "kept": None})
        cells = [row["label"], str(len(row["seeds"])), mean_std(row["kl"]), mean_std(row["kept"], 100.0)]
        cells += [
            str(row["answers"]),
            *(percent(statistics.fmean(row[name])) for name in ("realised_sparsity", "flops_reduction")),
        ]
        cells += [str(row["parameters"]), *(interval_text(other[name]) for name in MEASURES)]
        lines.append(_line(cells + [number(row["quoted"])] * quoted))
    lines += pairs_table(study.get("pairs", []))
    return "\n".join([*lines, "", study["sentence"], NOTE.format("\n" + QUOTED if quoted else ""), ""])


def pairs_table(pairs: list[dict[str, Any]]) -> list[str]:
    """Markdown: rows that are alike but for one parameter; nothing where there are none."""
    heads = ["", "against", "KL - it", "kept - it, points"]
    cells = [[one["label"], one["against"], *(interval_text(one[name]) for name in MEASURES)] for one in pairs]
    return ["", _line(heads), _line(["---"] * len(heads)), *map(_line, cells)] if pairs else []


NOTE = """
± is the standard deviation over seeds (text, items and training all vary). Intervals are 95 %, of the paired
difference over seeds and documents, each for itself: of twenty rows that change nothing one will seem to. Parameters:
trained.
{}"""
QUOTED = "paper: retention on five tasks, LLaMA2-7B at 30 % (arXiv 2412.11494)."


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def mean_std(values: list[float | None], scale: float = 1.0) -> str:
    """ "0.0123 ± 0.0011"; a dash where nothing was measured."""
    known = [scale * value for value in values if value is not None]
    if not known:
        return number(None)
    spread = f" ± {number(statistics.stdev(known), 2)}" if len(known) > 1 else ""
    return f"{number(statistics.fmean(known))}{spread}"


def points(rows: list[dict[str, Any]]) -> str:
    """The figure's numbers as CSV: a line per row and seed."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["label", "seed", "kl", "kept"])
    for row in rows:
        lines.writerows([row["label"], *cells] for cells in zip(row["seeds"], row["kl"], row["kept"]))
    return text.getvalue()


def picture(rows: list[dict[str, Any]]) -> bytes:
    """KL and answers kept of every row: each seed a ring, their mean a dot; both axes begin at zero."""
    from ftp_lightning.report.style import house_style, to_png

    with house_style():
        return to_png(_figure(rows))


def _figure(rows: list[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure

    from ftp_lightning.report.style import BLUE, ORANGE

    figure = Figure((8.6, 1.3 + 0.34 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, name, colour in ((left, "kl", BLUE), (right, "kept", ORANGE)):
        for place, row in enumerate(rows):
            known = [value for value in row[name] if value is not None]
            axis.plot(known, [place] * len(known), "o", mfc="none", color=colour, alpha=0.6)
            axis.plot([statistics.fmean(known)] if known else [], [place] if known else [], "D", color=colour)
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", nbins=5)
    left.set(yticks=range(len(rows)), yticklabels=[row["label"] for row in rows], ylim=(len(rows) - 0.4, -0.6))
    left.set_xlabel("KL to dense, nats per continuation token")
    right.set(xlabel="answers kept, share", xlim=(0, 1.02))
    return figure
