"""A grid of cells: finished cells stay, a refused one is left out, two processes share the work."""

import multiprocessing
from dataclasses import dataclass

import pandas
import pytest

from ftp_lightning.errors import UserError
from ftp_lightning.studies.grid import Cell, pack, read_grid, run_grid, sentences, unpack


@dataclass(frozen=True)
class Measured(Cell):
    method: str
    cut: float


CELLS = [Measured(method, cut) for method in ("static", "a/b c") for cut in (0.1, 0.2)]


def record(cell):
    return pandas.DataFrame([{"item": "x", "score": cell.cut}, {"item": "y", "score": None}])


def test_finished_cells_are_not_measured_again(tmp_path):
    seen = []
    for _ in range(2):
        run_grid(CELLS, lambda cell: seen.append(cell) or record(cell), tmp_path, say=lambda _: None)
    assert seen == CELLS
    found = read_grid(CELLS, tmp_path)
    assert len(found) == 2 * len(CELLS) and set(found.method) == {"static", "a/b c"}
    assert found[(found.method == "static") & (found.cut == 0.2)].score.tolist()[0] == 0.2
    assert {path.name for path in tmp_path.iterdir()} == {f"{cell.name}.jsonl" for cell in CELLS}


def test_columns_of_a_record_are_not_those_of_its_cell(tmp_path):
    """A cell of the task `squad` also holds rows of text, which are no answers to it."""
    run_grid(CELLS[:1], lambda cell: record(cell).assign(method=["static", "text"]), tmp_path, say=lambda _: None)
    assert read_grid(CELLS[:1], tmp_path).method.tolist() == ["static", "text"]


def test_a_refused_cell_is_said_and_left_out(tmp_path):
    said = []

    def measure(cell):
        if cell.cut == 0.2:
            raise UserError("out of reach\nGive less.")
        return record(cell)

    run_grid(CELLS, measure, tmp_path, said.append)
    assert sum("left out: out of reach" in line for line in said) == 2 and len(read_grid(CELLS, tmp_path)) == 4
    with pytest.raises(UserError, match="no finished cell"):
        read_grid(CELLS, tmp_path / "other")


def test_a_refusal_ends_a_script_with_its_sentence(capsys):
    with pytest.raises(SystemExit) as left, sentences():
        raise UserError("nothing is finished\nRun it first.")
    assert left.value.code == 2 and capsys.readouterr().err == "nothing is finished\nRun it first.\n"


def test_an_interrupted_cell_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_grid(CELLS, lambda cell: (_ for _ in ()).throw(KeyboardInterrupt), tmp_path)
    assert not list(tmp_path.iterdir())


def work(folder, seen):
    run_grid(CELLS * 5, lambda cell: seen.append(cell.name) or record(cell), folder, say=lambda _: None)


def test_two_processes_measure_each_cell_once(tmp_path):
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        seen = manager.list()
        workers = [context.Process(target=work, args=(tmp_path, seen)) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert sorted(seen) == sorted(cell.name for cell in CELLS)


def test_a_packed_grid_goes_on_where_it_was(tmp_path):
    run_grid(CELLS[:2], record, tmp_path / "a", say=lambda _: None)
    pack(tmp_path / "a", tmp_path / "all.xz", left_out=("score",))
    unpack(tmp_path / "all.xz", tmp_path / "b")
    seen = []
    run_grid(CELLS, lambda cell: seen.append(cell) or record(cell), tmp_path / "b", say=lambda _: None)
    assert seen == CELLS[2:]
    found = read_grid(CELLS, tmp_path / "b")
    assert len(found) == 8 and found.score.notna().sum() == 2  # what was left out is gone


def test_a_cell_of_no_items_is_an_empty_file_and_can_be_packed(tmp_path):
    run_grid(CELLS[:1], lambda cell: pandas.DataFrame([]), tmp_path / "cells", lambda said: None)
    (file,) = (tmp_path / "cells").glob("*.jsonl")
    assert file.read_bytes() == b""
    pack(tmp_path / "cells", tmp_path / "packed.xz")
    unpack(tmp_path / "packed.xz", tmp_path / "again")
    assert (tmp_path / "again" / file.name).read_bytes() == b""
