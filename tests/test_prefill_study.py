"""The study of prefills: cells of one model, precision and length are measured together."""

import pytest

from ftp_lightning.errors import UserError
from ftp_lightning.studies import prefill
from ftp_lightning.studies.grid import run_grid
from ftp_lightning.studies.prefill import Prefill, Prefills

CELLS = [Prefill("embedded", "float32", 64, shape, cut) for shape in ("evict", "stages") for cut in (0.2, 0.8)]


@pytest.fixture
def rounds(monkeypatch):
    """Pruners of each call of `timed`; two rounds of each."""
    found, timed = [], prefill.timed

    def two(model, pruners, prompts, rounds, generator, settled):
        found.append(len(pruners))
        return timed(model, pruners, prompts, 2, generator)

    monkeypatch.setattr(prefill, "timed", two)
    return found


def test_a_cell_that_cannot_be_placed_is_refused_alone(rounds, tmp_path):
    """Two stages of the embedded model save at most 73 % of 64 tokens."""
    said = []
    run_grid(CELLS, Prefills(tuple(CELLS), tmp_path).measure, tmp_path, said.append)
    assert rounds == [3]
    assert [line for line in said if "left out" in line] == [line for line in said if line.startswith(CELLS[3].name)]
    assert {path.stem for path in tmp_path.glob("*.jsonl")} == {cell.name for cell in CELLS[:3]}
    with pytest.raises(UserError, match="cannot be reached"):
        Prefills(tuple(CELLS), tmp_path).measure(CELLS[3])


def test_finished_cells_are_not_measured_with_the_others(rounds, tmp_path):
    (tmp_path / f"{CELLS[0].name}.jsonl").write_text("")
    found = Prefills(tuple(CELLS[:3]), tmp_path).measure(CELLS[1])
    assert rounds == [2] and {"speedup", "flops_limit", "shape_limit"} <= {*found.columns}
