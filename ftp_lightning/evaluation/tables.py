"""The tables of an evaluation, and how any table is written: Markdown, CSV and LaTeX, by pandas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftp_lightning.cells import csv_cell
from ftp_lightning.evaluation import quoted
from ftp_lightning.evaluation.harness.declared import PAPER

Record = Mapping[str, Any]
Results = Mapping[str, Any]
"""What results.json holds, see `outcome.results_of`."""
MISSING = "–"
_LATEX: dict[str, str | int | None] = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "<": "$<$", ">": "$>$",
    "§": r"\S{}", "†": r"$\dagger$",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """`records`: flat values, one per row. `columns`: heading -> how a record is shown there."""

    name: str
    title: str
    columns: Mapping[str, Callable[[Record], str]]
    records: Sequence[Record]
    notes: Sequence[str] = field(default=())

    def shown(self) -> Any:
        """The rows as text, a pandas.DataFrame with the headings as columns."""
        import pandas

        rows = [[show(record) for show in self.columns.values()] for record in self.records]
        return pandas.DataFrame(rows, columns=list(self.columns), dtype=str)

    def markdown(self) -> str:
        shown = self.shown().map(_markdown_text).rename(columns=_markdown_text)
        rows = shown.to_markdown(index=False, tablefmt="github", disable_numparse=True)
        notes = ["", *(f"{note}  " for note in self.notes)] if self.notes else []
        return "\n".join([f"### {self.title}", "", rows, *notes]) + "\n"

    def csv(self) -> str:
        """Every field of the records; numbers in full, nothing where there is none."""
        import pandas

        rows = [{name: csv_cell(value) for name, value in record.items()} for record in self.records]
        return pandas.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")

    def latex(self) -> str:
        """A booktabs table with caption and label."""
        spec = "l" + "r" * (len(self.columns) - 1)
        about = {"column_format": spec, "caption": latex_text(self.title), "label": f"tab:{self.name}"}
        shown = self.shown().map(latex_text).rename(columns=latex_text)
        notes = "".join(rf"\par\footnotesize {latex_text(note)}" + "\n" for note in self.notes)
        return shown.to_latex(index=False, position="ht", **about).replace("\\end{table}", notes + "\\end{table}")


def _markdown_text(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split("\n"))


def latex_text(text: str) -> str:
    """`text` with all characters escaped that LaTeX reads as its own."""
    return text.translate(str.maketrans(_LATEX))


def written(tables: Sequence[Table]) -> dict[str, str]:
    """File name -> content: all tables in tables.md and tables.tex (which needs booktabs), each in NAME.csv."""
    tables = [table for table in tables if table.records]
    files = {f"{table.name}.csv": table.csv() for table in tables}
    joined = {"tables.md": "\n".join(table.markdown() for table in tables)}
    return joined | {"tables.tex": "\n".join(table.latex() for table in tables)} | files


# ---------------------------------------------------------------- how values are shown


def text(name: str) -> Callable[[Record], str]:
    return lambda record: MISSING if record.get(name) is None else str(record[name])


def percent(name: str, digits: int = 1) -> Callable[[Record], str]:
    """A share in [0, 1] as per cent."""
    return lambda record: MISSING if record.get(name) is None else f"{100 * record[name]:.{digits}f}"


def number(name: str, digits: int = 3) -> Callable[[Record], str]:
    return lambda record: MISSING if record.get(name) is None else f"{record[name]:.{digits}g}"


def fixed(name: str, digits: int) -> Callable[[Record], str]:
    return lambda record: MISSING if record.get(name) is None else f"{record[name]:.{digits}f}"


def with_error(name: str, error: str) -> Callable[[Record], str]:
    """ "61.3 ± 1.2", both in per cent."""

    def show(record: Record) -> str:
        if record.get(name) is None:
            return MISSING
        spread = "" if record.get(error) is None else f" ± {100 * record[error]:.1f}"
        return f"{100 * record[name]:.1f}{spread}"

    return show


def with_interval(
    name: str, low: str, high: str, scale: float = 100.0, sign: str = "", shown: str = ".1f"
) -> Callable[[Record], str]:
    """ "91.2 [89.7, 92.5]"; `shown`: the format of each number."""

    def show(record: Record) -> str:
        if record.get(name) is None:
            return MISSING
        ends = [end for end in (record.get(low), record.get(high)) if end is not None]
        inside = f" [{', '.join(f'{scale * end:{sign}{shown}}' for end in ends)}]" if len(ends) == 2 else ""
        return f"{scale * record[name]:{sign}{shown}}{inside}"

    return show


# ---------------------------------------------------------------- of one evaluation


def result_tables(results: Results) -> list[Table]:
    """All tables of one results.json."""
    tables = [
        methods_table(results),
        own_answers_table(results),
        tasks_table(results),
        leak_table(results),
        pairs_table(results),
    ]
    return [*tables, retention_table(results)]


def methods_table(results: Results) -> Table:
    """Dense, the noise floor, and every method on text."""
    floor = results["noise_floor"]
    rows: list[Record] = [
        {"method": "dense", "realised": 0.0, "flops_cut": 0.0, "kl": 0.0, "top1": 1.0, "ppl": results["dense"]["ppl"]},
        {"method": f"noise floor: dense, {floor['against']}", "kl": floor["kl"], "top1": floor["top1"]},
    ]
    for method in results["methods"]:
        rows.append(
            {
                "method": method["name"],
                "kv": method["kv"],
                "budget": method["budget"],
                "realised": method["realised_sparsity"],
                "flops_cut": method["flops_reduction"],
                "kl": method["kl"]["mean"],
                "kl_p99": method["kl"]["p99"],
                "top1": method["kl"]["top1"],
                "ppl": method["ppl"]["prompt"],
                "ppl_sequence": method["ppl"]["sequence"],
                **_prefixed("kept", method["kept"], ("share", "low", "high", "items")),
                **_retention(method),
            }
        )
    columns = {
        "method": text("method"),
        "kv": text("kv"),
        "budget, %": percent("budget"),
        "realised, %": percent("realised"),
        "FLOPs cut, %": percent("flops_cut"),
        "kept, % [95 %]": with_interval("kept_share", "kept_low", "kept_high"),
        "KL": number("kl"),
        "KL p99": number("kl_p99"),
        "top-1, %": percent("top1", 2),
        "PPL": fixed("ppl", 2),
        "PPL sequence": fixed("ppl_sequence", 2),
        "retention, % [95 %]": with_interval("retention", "retention_low", "retention_high", 1.0),
    }
    return Table("methods", "Methods on text", columns, rows)


def own_answers_table(results: Results) -> Table:
    """What a method keeps of the dense model's own answers, with intervals; no rows where none were asked for."""
    rows = [
        {
            "method": method["name"],
            "answers": own["items"],
            **_prefixed("whole", own, ENDS),
            **_prefixed("first", own.get("first"), ENDS),
            **_prefixed("kl", own.get("kl"), ("mean", "low", "high")),
        }
        for method in results["methods"]
        if (own := method.get("own_answers"))
    ]
    columns = {
        "method": text("method"),
        "answers": text("answers"),
        "whole answers kept, % [95 %]": with_interval("whole_share", "whole_low", "whole_high"),
        "first tokens kept, % [95 %]": with_interval("first_share", "first_low", "first_high"),
        "KL per token [95 %]": with_interval("kl_mean", "kl_low", "kl_high", 1.0, shown=".3g"),
    }
    return Table("own_answers", "The dense model's own answers", columns, rows, (OWN_ANSWERS_NOTE,))


ENDS = ("share", "low", "high")
OWN_ANSWERS_NOTE = (
    "The dense model answers each prompt greedily. A whole answer is kept where the pruned model gives it word for "
    "word. KL is in nats, averaged within each answer first."
)


def tasks_table(results: Results) -> Table:
    """One row per task and method, dense first."""
    rows: list[Record] = []
    for task, dense in results["dense"]["tasks"].items():
        rows.append({"task": task, "method": "dense", **_scored(dense), "mark": _mark(dense)})
        for method in results["methods"]:
            if cell := method["tasks"].get(task):
                kept = _prefixed("kept", cell.get("kept"), ("share", "low", "high", "items"))
                rows.append({"task": task, "method": method["name"], **_scored(cell), **kept, "mark": _mark(cell)})
    columns = {
        "task": text("task"),
        "method": text("method"),
        "metric": text("metric"),
        "items": text("n"),
        "chance, %": percent("chance"),
        "prompt tokens": fixed("prompt_tokens", 0),
        "sparsity, %": percent("sparsity"),
        "FLOPs cut, %": percent("flops_cut"),
        "score, %": with_error("score", "stderr"),
        "[95 %]": lambda r: with_interval("score", "low", "high")(r).partition(" ")[2],
        "skill, % [95 %]": with_interval("skill", "skill_low", "skill_high"),
        "kept, % [95 %]": with_interval("kept_share", "kept_low", "kept_high"),
        "mark": text("mark"),
    }
    notes = (
        "c: dense is within 2 standard errors of chance. e: not exercised, the prompts are too short to be pruned. "
        "Both count in no mean. t: so many contexts were cut to the model's window.",
    )
    return Table("tasks", "Tasks", columns, rows, notes)


def leak_table(results: Results) -> Table:
    """The same pruned model, the prompt alone routed and the whole text: what the answer tells its own question."""
    rows = [
        {"task": task, "method": method["name"], "prompt": cell["acc"], **cell["sequence"]}
        for method in results["methods"]
        for task, cell in method["tasks"].items()
        if cell.get("sequence")
    ]
    columns = {
        "task": text("task"),
        "method": text("method"),
        "`prompt`, %": percent("prompt"),
        "`sequence`, %": percent("acc"),
        "difference [95 %]": with_interval("difference", "low", "high", sign="+"),
        "lost": text("lost"),
        "gained": text("gained"),
        "p": number("p", 2),
    }
    return Table(
        "leak", "The same model in both modes", columns, rows, ("In `sequence` later tokens move the routing.",)
    )


def pairs_table(results: Results) -> Table:
    """Paired tests on the same items."""
    columns = {
        "task": text("task"),
        "A": text("a"),
        "B": text("b"),
        "items": text("items"),
        "documents": text("clusters"),
        "A - B, points [95 %]": with_interval("difference", "low", "high", sign="+"),
        "lost": text("lost"),
        "gained": text("gained"),
        "McNemar p": number("p", 2),
    }
    notes = ("The interval knows documents, not trainings. A differs from B where it excludes 0; none: one document.",)
    return Table("pairs", "Paired tests", columns, results.get("paired", ()), notes)


def retention_table(results: Results) -> Table:
    """Ours over the paper's tasks beside the paper's own numbers; empty where none of its tasks was run."""
    asked = [task for task in PAPER if task in results["dense"]["tasks"]]
    ours = [
        {"model": "this model", "method": m["name"], "sparsity": m["budget"], **_retention(m), "source": "measured"}
        for m in results["methods"]
    ]
    counted = ", ".join(results.get("counted", ())) or "none: no task measures anything"
    notes = (f"Measured over: {counted}.", "Quoted rows are of other models, harness versions and settings.")
    return Table("retention", "Retention beside the paper's", RETENTION, [*ours, *quoted.MAIN] if asked else [], notes)


RETENTION = {
    "model": text("model"),
    "method": text("method"),
    "sparsity, %": percent("sparsity"),
    "retention, % [95 %]": with_interval("retention", "retention_low", "retention_high", 1.0),
    "source": text("source"),
}


def _retention(method: Mapping[str, Any]) -> Record:
    low, high = method.get("retention_interval") or (None, None)
    return {"retention": method.get("retention"), "retention_low": low, "retention_high": high}


def _scored(cell: Mapping[str, Any]) -> Record:
    names = ("metric", "n", "chance", "prompt_tokens", "sparsity", "flops_cut", "stderr", "low", "high", "skill")
    low, high = cell.get("skill_interval") or (None, None)
    return {"score": cell["acc"], **{k: cell.get(k) for k in names}, "skill_low": low, "skill_high": high}


def _mark(cell: Mapping[str, Any]) -> str:
    cut = cell.get("truncated") or 0
    marks = ["c"] * bool(cell.get("near_chance")) + ["e"] * (cell.get("exercised") is False)
    return " ".join([*marks, *([f"t{cut}"] if cut else [])])


def _prefixed(prefix: str, values: Mapping[str, Any] | None, names: tuple[str, ...]) -> Record:
    return {f"{prefix}_{name}": values[name] for name in names} if values else {}
