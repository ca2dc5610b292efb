"""Writes the report's files: each is replaced whole, and only files that a report makes are ever touched."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ftp_lightning.errors import file_error
from ftp_lightning.whole_files import write_bytes

KINDS = ("png", "csv")


def write_report(folder: Path, page: str, drawn: dict[str, dict[str, Any]], names: Iterable[str]) -> Path:
    """Writes NAME.png and NAME.csv of every figure in `drawn` into `folder`/report, then `folder`/report.html.

    `names` are all figures a report can hold: those of an earlier report that are not drawn now are removed. Any other
    file in `folder`/report stays as it is. The page comes last, so an interrupted call leaves the former one readable.
    Errors: UserError if `folder` cannot be written to.
    """
    try:
        write_figures(folder / "report", drawn)
        remove_figures(folder / "report", set(names) - set(drawn))
        write_bytes(folder / "report.html", page.encode())
    except OSError as error:
        raise file_error(error) or error from error
    return folder / "report.html"


def write_figures(folder: Path, drawn: dict[str, dict[str, Any]]) -> None:
    """NAME.png and NAME.csv of every figure."""
    folder.mkdir(exist_ok=True)
    for name, files in drawn.items():
        for kind in KINDS:
            write_bytes(folder / f"{name}.{kind}", files[kind])


def remove_figures(folder: Path, names: Iterable[str]) -> None:
    """Removes the files of the named figures, where there are any."""
    for name in names:
        for kind in KINDS:
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
