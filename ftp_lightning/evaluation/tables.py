"""Tables as Markdown, CSV and LaTeX: one list of records, shown in three ways. CSV holds the plain numbers."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]
MISSING = "–"
_LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
          "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--",
          "<": "$<$", ">": "$>$", "§": r"\S{}", "†": r"$\dagger$"}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """`records`: flat values, one per row. `columns`: heading -> how a record is shown there."""

    name: str
    title: str
    columns: Mapping[str, Callable[[Record], str]]
    records: Sequence[Record]
    notes: Sequence[str] = field(default=())

    def cells(self) -> list[list[str]]:
        """The rows as text, without the headings."""
        return [[show(record) for show in self.columns.values()] for record in self.records]

    def markdown(self) -> str:
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in [list(self.columns), *self.cells()]]
        head, *rows = ("| " + " | ".join(row) + " |" for row in escaped)
        rule = "|" + "---|" * len(self.columns)
        notes = ["", *(f"{note}  " for note in self.notes)] if self.notes else []
        return "\n".join([f"### {self.title}", "", head, rule, *rows, *notes]) + "\n"

    def csv(self) -> str:
        """Every field of the records; numbers in full, nothing where there is none."""
        names = list(dict.fromkeys(name for record in self.records for name in record))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in self.records)
        return text.getvalue()

    def latex(self) -> str:
        """A booktabs table with caption and label."""
        lines = [" & ".join(map(escape_latex, row)) + r" \\" for row in [list(self.columns), *self.cells()]]
        spec = "l" + "r" * (len(self.columns) - 1)
        notes = "".join(rf"\par\footnotesize {escape_latex(note)}" + "\n" for note in self.notes)
        return (
            "\\begin{table}\n\\centering\n"
            f"\\caption{{{escape_latex(self.title)}}}\\label{{tab:{self.name}}}\n"
            f"\\begin{{tabular}}{{{spec}}}\n\\toprule\n{lines[0]}\n\\midrule\n" + "\n".join(lines[1:]) + "\n"
            f"\\bottomrule\n\\end{{tabular}}\n{notes}\\end{{table}}\n"
        )


def escape_latex(text: str) -> str:
    return re.sub("|".join(map(re.escape, _LATEX)), lambda match: _LATEX[match.group()], text)


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


def with_interval(name: str, low: str, high: str, scale: float = 100.0, sign: str = "") -> Callable[[Record], str]:
    """ "91.2 [89.7, 92.5]"."""

    def show(record: Record) -> str:
        if record.get(name) is None:
            return MISSING
        ends = [end for end in (record.get(low), record.get(high)) if end is not None]
        inside = f" [{', '.join(f'{scale * end:{sign}.1f}' for end in ends)}]" if len(ends) == 2 else ""
        return f"{scale * record[name]:{sign}.1f}{inside}"

    return show
