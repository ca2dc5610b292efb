"""A study: rows of settings, each measured under several seeds. Reads `study.json` and says what differs.

    {"question": …, "command": …, "metrics": [{"name": …, "title": …, "unit": …, "better": "higher"}],
     "rows": [{"label": …, "parameters": {…}, "seeds": [0, 1, 2], "metrics": {NAME: [one value per seed]}}],
     "baseline": LABEL, "compared": [{"label": LABEL, NAME: {"difference": …, "low": …, "high": …}}], "sentence": …}

Only `rows` must be there. `metrics` may also be plain names; without it the names are those of the first row. A row
may hold its lists beside its label instead of in `metrics`; what it holds otherwise are its parameters. A value that a
seed does not have is null. `compared` are differences to the baseline that the study itself has measured, item by item:
where they are there they decide what differs, and `sentence` says it; else it is a paired t interval over seeds.
Without `baseline` the first row is it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.spread import t_quantile
from ftp_lightning.report.reading import read_json
from ftp_lightning.report.wording import MISSING, number, signed

STUDY = "study.json"
Study = dict[str, Any]


def read_study(folder: Path) -> Study | None:
    """The study in a folder, its metrics as {"name", "unit", "better"}; None where there is none.

    Errors: UserError that names what of study.json is not as it must be.
    """
    study = read_json(folder / STUDY)
    if study is None:
        return None
    if problem := what_is_wrong(study):
        raise UserError(f"{folder / STUDY}: {problem}\nRun the study again.")
    rows = [tidy(row) for row in study["rows"]]
    named = study.get("metrics") or list(rows[0]["metrics"])
    known = [{"name": metric} if isinstance(metric, str) else metric for metric in named]
    metrics = [{"title": m["name"], "unit": "", "better": None} | KNOWN.get(m["name"], {}) | m for m in known]
    return study | {"rows": rows, "metrics": metrics, "baseline": study.get("baseline", rows[0]["label"])}


KNOWN = {
    "kl": {"title": "KL to dense", "unit": "nats per continuation token", "better": "lower"},
    "kept": {"title": "answers kept", "unit": "share", "better": "higher"},
    "realised_sparsity": {"title": "realised sparsity", "unit": "share"},
    "flops_reduction": {"title": "FLOPs cut", "unit": "share"},
    "validation_kl": {"title": "validation KL", "unit": "nats per continuation token", "better": "lower"},
}
"""What our own measures are called on the page."""


def measured(row: dict[str, Any]) -> dict[str, list[float | None]]:
    """Metric -> values of one row, whether it has them in `metrics` or beside its label."""
    if row.get("metrics"):
        return row["metrics"]
    lists = {name: v for name, v in row.items() if isinstance(v, list) and len(v) == len(row["seeds"])}
    return {n: v for n, v in lists.items() if n != "seeds" and all(x is None or isinstance(x, int | float) for x in v)}


def tidy(row: dict[str, Any]) -> dict[str, Any]:
    """The row as {"label", "seeds", "metrics", "parameters"}."""
    metrics, given = measured(row), row.get("parameters")
    if isinstance(given, dict):
        parameters = given
    else:
        apart = {"label", "seeds", "metrics", *metrics}
        parameters = {name: value for name, value in row.items() if name not in apart and value is not None}
    return {"label": row["label"], "seeds": row["seeds"], "metrics": metrics, "parameters": parameters}


def what_is_wrong(study: Any) -> str | None:
    """What keeps a parsed study.json from being shown, in a sentence; None where nothing does."""
    if not isinstance(study, dict) or not isinstance(study.get("rows"), list) or not study["rows"]:
        return "it has no rows"
    labels = [row.get("label") for row in study["rows"]]
    for row in study["rows"]:
        if not isinstance(row.get("seeds"), list):
            return f"row {row.get('label')!r} names no seeds"
        for name, values in measured(row).items():
            if not isinstance(values, list) or len(values) != len(row["seeds"]):
                return f"row {row.get('label')!r}: {name} must have one value per seed"
            if any(value is not None and not isinstance(value, int | float) for value in values):
                return f"row {row.get('label')!r}: {name} holds something that is not a number"
    if None in labels or len({*labels}) < len(labels):
        return "every row must have a label of its own"
    if study.get("baseline") is not None and study["baseline"] not in labels:
        return f"the baseline {study['baseline']!r} is none of its rows"
    return None


def by_seed(row: dict[str, Any], metric: str) -> dict[Any, float]:
    """Seed -> value of one row, those that have one."""
    values = row["metrics"].get(metric) or []
    return {seed: value for seed, value in zip(row["seeds"], values) if value is not None and math.isfinite(value)}


def mean_and_std(values: list[float]) -> tuple[Any, Any]:
    """Mean and sample standard deviation (n - 1); None where there are too few values."""
    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    spread = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(spread / (len(values) - 1)) if len(values) > 1 else None


def half_width(std: float | None, n: int) -> Any:
    """Half of the 95 % interval of a mean of n values: t s / sqrt(n)."""
    return None if std is None else t_quantile(n - 1) * std / math.sqrt(n)


def difference(row: dict[str, Any], baseline: dict[str, Any], metric: str) -> tuple[float, float] | None:
    """Mean of row minus baseline over the seeds that both have, and half of its 95 % interval (paired t).

    Seeds are paired, as two rows of one seed share data and order. None with fewer than two common seeds.
    """
    own, other = by_seed(row, metric), by_seed(baseline, metric)
    pairs = [own[seed] - other[seed] for seed in own if seed in other]
    if len(pairs) < 2:
        return None
    mean, std = mean_and_std(pairs)
    return mean, half_width(std, len(pairs))


def study_rows(study: Study) -> list[dict[str, Any]]:
    """label, metric, seeds, mean, std, low, high, values, difference, difference_half, differs: one row per setting and
    metric."""
    baseline = next((row for row in study["rows"] if row["label"] == study.get("baseline")), None)
    found = []
    for metric in study["metrics"]:
        for row in study["rows"]:
            values = list(by_seed(row, metric["name"]).values())
            mean, std = mean_and_std(values)
            half = half_width(std, len(values))
            apart = difference(row, baseline, metric["name"]) if baseline and row is not baseline else None
            limits = (mean, mean) if half is None else (mean - half, mean + half)
            found.append({
                "label": row["label"], "metric": metric["name"], "seeds": len(values), "mean": mean, "std": std,
                "low": limits[0], "high": limits[1], "values": values,
                "difference": apart and apart[0], "difference_half": apart and apart[1],
                "differs": differs(study, row["label"], metric["name"], apart),
            })  # fmt: skip
    return found


def differs(study: Study, label: str, metric: str, apart: tuple[float, float] | None) -> bool:
    """Whether a row differs from the baseline: by the study's own interval, else by the paired one over seeds.

    Both know that trainings vary; the study's own also knows its documents.
    """
    if study.get("compared") is not None:
        found = next((one.get(metric) for one in study["compared"] if one["label"] == label), None)
        return is_sure(found)
    return apart is not None and abs(apart[0]) > apart[1]


def is_sure(found: dict[str, Any] | None) -> bool:
    """Whether a difference can be claimed: its interval excludes 0 and no seed says the opposite."""
    if not found or found["low"] is None or found["low"] <= 0 <= found["high"]:
        return False
    return all(value * found["difference"] > 0 for value in found.get("by_seed", [found["difference"]]))


def statements(study: Study) -> list[str]:
    """A sentence per metric: which rows differ from the baseline by more than the 95 % interval of the difference."""
    if study.get("sentence"):
        return [study["sentence"]]
    rows = study_rows(study)
    said = []
    for metric in study["metrics"]:
        mine = [row for row in rows if row["metric"] == metric["name"] and row["difference"] is not None]
        sure = [row for row in mine if row["differs"]]
        changes = "; ".join(
            f"{row['label']} {signed(row['difference'])} ± {number(row['difference_half'])}" for row in sure
        )
        unit = f" ({metric['unit']})" if metric["unit"] else ""
        if mine:
            rest = f"; {len(mine) - len(sure)} not" if len(sure) < len(mine) else ""
            clause = f"{changes}{rest}" if sure else "no row differs by more than its interval"
            said.append(f"{metric['title']}{unit}, against {study['baseline']}: {clause}.")
    return said


def table(study: Study) -> tuple[list[str], list[list[str]]]:
    """Columns and cells: label, the parameters that differ, seeds, and mean ± std of every metric, * where it differs
    from the baseline by more than the interval."""
    rows = study_rows(study)
    at = {(row["label"], row["metric"]): row for row in rows}
    varied = varied_parameters(study)
    columns = ["setting", *varied, "seeds", *(metric["title"] for metric in study["metrics"])]
    cells = []
    for row in study["rows"]:
        parameters = [str(row.get("parameters", {}).get(name, MISSING)) for name in varied]
        values = [cell(at[row["label"], metric["name"]]) for metric in study["metrics"]]
        cells.append([row["label"], *parameters, str(len(row["seeds"])), *values])
    return columns, cells


def varied_parameters(study: Study) -> list[str]:
    """Parameters that are not the same in all rows, in the order of their first appearance."""
    names = dict.fromkeys(name for row in study["rows"] for name in row.get("parameters", {}))
    return [n for n in names if len({str(row.get("parameters", {}).get(n)) for row in study["rows"]}) > 1]


def cell(row: dict[str, Any]) -> str:
    """ "0.912 ± 0.004 *"."""
    if row["mean"] is None:
        return MISSING
    star = " *" if row["differs"] else ""
    return number(row["mean"]) + ("" if row["std"] is None else f" ± {number(row['std'])}") + star
