"""An experiment is a grid of cells and one function that measures a cell; what is finished is not measured again."""

from __future__ import annotations

import argparse
import json
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ftp_lightning.errors import UserError
from ftp_lightning.lock import Lock
from ftp_lightning.whole_files import make_folder, write_bytes, write_text

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Cell:
    """One measurement of a grid; subclasses add fields. `name` is its file's name, made of the fields' values."""

    @property
    def name(self) -> str:
        return "-".join(str(value).replace("/", "_").replace(" ", "_") for value in asdict(self).values())


LABELS = ("answers", "metric", "label", "id")
"""Columns that no table reads: they are not published."""

AnyCell = TypeVar("AnyCell", bound=Cell)


def run_grid(
    cells: Iterable[AnyCell],
    measure: Callable[[AnyCell], DataFrame | None],
    folder: Path,
    say: Callable[[str], None] = print,
) -> None:
    """Measure each cell that has no file yet, and write its items to `folder`/NAME.jsonl, whole or not at all.

    Several processes may run the same grid at once: each cell is locked while it is measured, and the others go on
    with the next one. After a kill the same command goes on; the kernel frees the lock. `measure` returns a record
    (see `evaluation.record`), or None where there is nothing to measure, which is written as an empty file. A cell that
    a UserError refuses is said and left out.
    """
    make_folder(folder)
    for cell in cells:
        path = folder / f"{cell.name}.jsonl"
        lock = Lock(folder / f".{cell.name}.lock")
        if path.exists() or not lock.take():
            continue
        try:
            if not path.exists():
                found = measure(cell)
                some = found is not None and not found.empty  # of none pandas would write a blank line
                write_text(path, found.to_json(orient="records", lines=True) if found is not None and some else "")
                say(f"{cell.name}: {0 if found is None else len(found)} items")
        except UserError as error:
            say(f"{cell.name}: left out: {str(error).splitlines()[0]}")
        finally:
            lock.free()


def read_grid(cells: Sequence[AnyCell], folder: Path) -> DataFrame:
    """The items of all finished cells in one table, each with the fields of its cell that it lacks."""
    import pandas

    parts = []
    for cell in cells:
        path = folder / f"{cell.name}.jsonl"
        if path.exists() and path.stat().st_size:
            found = pandas.read_json(path, orient="records", lines=True)
            parts.append(found.assign(**{name: value for name, value in asdict(cell).items() if name not in found}))
    if not parts:
        raise UserError(f"{folder} holds no finished cell of this grid\nRun the experiment without --tables first.")
    return pandas.concat(parts, ignore_index=True)


def pack(folder: Path, file: Path, left_out: Sequence[str] = ()) -> None:
    """Put the records of all finished cells into one compressed file, without the columns `left_out`."""
    lines = []
    for path in sorted(folder.glob("*.jsonl")):
        rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        kept = [{name: value for name, value in row.items() if name not in left_out} for row in rows]
        lines.append(json.dumps({"cell": path.stem, "items": kept}))
    write_bytes(file, lzma.compress("\n".join(lines).encode()))


def unpack(file: Path, folder: Path) -> None:
    """Write the cells of a packed file into a folder, so that a grid goes on from them; those that are there stay."""
    make_folder(folder)
    for line in lzma.decompress(file.read_bytes()).decode().splitlines():
        cell = json.loads(line)
        path = folder / f"{cell['cell']}.jsonl"
        if not path.exists():
            write_text(path, "".join(json.dumps(row) + "\n" for row in cell["items"]))


def arguments(doc: str | None, output: str, packed: str | None = None, **more: Any) -> argparse.Namespace:
    """The flags that every experiment has: where to write, whether to show tables alone; `more`: name=default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(output), help="folder of the measured cells")
    known = packed and Path(packed)
    parser.add_argument("--packed", type=Path, default=known, help="file of finished cells: go on from it, update it")
    parser.add_argument("--tables", action="store_true", help="measure nothing; write the tables of what is finished")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default: {default}")
    return parser.parse_args()


@contextmanager
def sentences() -> Iterator[None]:
    """A UserError inside ends the script with its sentence and exit status 2."""
    try:
        yield
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def finished(
    cells: Sequence[AnyCell], measure: Callable[[AnyCell], DataFrame | None], args: argparse.Namespace
) -> DataFrame:
    """All items of a grid, for an experiment with `arguments`: unpacked, measured unless --tables, packed again."""
    if args.packed and args.packed.is_file():
        unpack(args.packed, args.output)
    if not args.tables:
        run_grid(cells, measure, args.output)
        if args.packed:
            pack(args.output, args.packed, LABELS)
    return read_grid(cells, args.output)
