"""Tables as Markdown, CSV and LaTeX, by pandas: one list of records, shown in three ways. CSV holds plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]
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

        return pandas.DataFrame(list(self.records), dtype=object).to_csv(index=False, lineterminator="\n")

    def latex(self) -> str:
        """A booktabs table with caption and label."""
        spec = "l" + "r" * (len(self.columns) - 1)
        about = {"column_format": spec, "caption": latex_text(self.title), "label": f"tab:{self.name}"}
        shown = self.shown().map(latex_text).rename(columns=latex_text)
        notes = "".join(rf"\par\footnotesize {latex_text(note)}" + "\n" for note in self.notes)
        return shown.to_latex(index=False, position="ht", **about).replace("\\end{table}", notes + "\\end{table}")


def _markdown_text(text: str) -> str:
    return text.replace("|", "\\|")


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


def with_interval(name: str, low: str, high: str, scale: float = 100.0, sign: str = "") -> Callable[[Record], str]:
    """ "91.2 [89.7, 92.5]"."""

    def show(record: Record) -> str:
        if record.get(name) is None:
            return MISSING
        ends = [end for end in (record.get(low), record.get(high)) if end is not None]
        inside = f" [{', '.join(f'{scale * end:{sign}.1f}' for end in ends)}]" if len(ends) == 2 else ""
        return f"{scale * record[name]:{sign}.1f}{inside}"

    return show
