"""The comparison of schedules: a tiny cell end to end, gone on with where it stopped, its tables and figure."""

import json
import sys

import pytest
from pictures import shows_something
from scripts import script

TINY = """--budgets 0.5 --kv keep --seeds 0 --items 24 --windows 4 --calibration_windows 4 --population 3
--generations 2"""


@pytest.fixture(scope="module")
def study():
    return script("experiments/schedules.py")


def call(study, monkeypatch, folder, *more):
    monkeypatch.setattr(sys, "argv", ["schedules.py", "--output", str(folder), *TINY.split(), *more])
    study.main()


@pytest.mark.slow
def test_every_way_is_measured_once_at_equal_tokens(study, monkeypatch, tmp_path, capsys):
    call(study, monkeypatch, tmp_path)
    result = tmp_path / "keep-0.5-0.json"
    found = json.loads(result.read_text())
    assert {*study.SEARCHES, "uniform", "late", "sensitivity"} <= set(found)
    limit = 3 * 3 * 4 * 256
    for name in study.SEARCHES:
        curve, sparsity = found[name]["curve"], found[name]["sparsity"]
        assert sum(sparsity) / len(sparsity) == pytest.approx(0.5, abs=1e-9)
        assert [loss for _, loss in curve] == sorted((loss for _, loss in curve), reverse=True)
        least = limit // 2 if name.startswith("ours") else limit
        assert curve[-1][0] >= least and (len(curve) == 1 or curve[-2][0] < least + 16 * 256)
    assert found["ours same windows"]["calibration"] <= min(
        found[n]["calibration"] for n in ("uniform", "late", "sensitivity")
    )
    written = result.stat().st_mtime_ns
    assert shows_something(tmp_path / "schedules.png")
    capsys.readouterr()
    call(study, monkeypatch, tmp_path)
    assert result.stat().st_mtime_ns == written
    assert "### 50%, `keep`" in capsys.readouterr().out


def test_the_share_of_tokens_is_read_off_both_curves(study):
    rival = [(100, 3.0), (200, 1.0), (300, 1.0)]
    assert study.share_of_tokens([(10, 2.0), (20, 0.5)], rival) == 0.1
    assert study.share_of_tokens([(10, 2.0)], rival) is None


def test_a_row_is_kept_without_what_no_table_reads(study):
    row = {"curve": [(1, 3.0), (2, 3.0), (3, 2.0), (4, 2.0)], "right": [True, False], "held": {"kl": 1 / 3}}
    found = study.compact(row | {"sparsity": [1 / 3]})
    assert found["curve"] == [(1, 3.0), (3, 2.0), (4, 2.0)] and found["right"] == [1, 0]
    assert found["held"]["kl"] == 0.3333333 and found["sparsity"] == [1 / 3]


def test_a_seed_that_lacks_ours_is_in_no_table_and_no_figure(study, monkeypatch, tmp_path, capsys):
    row = {"sparsity": [0.5, 0.5], "curve": [[10, 1.0]], "calibration": 1.0}
    (tmp_path / "keep-0.5-0.json").write_text(json.dumps({"ours": row}))
    call(study, monkeypatch, tmp_path, "--tables")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "schedules.png").exists()


def test_an_unknown_method_is_told_before_anything_is_measured(study, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(study, monkeypatch, tmp_path, "--methods", "uniform,plain_GA")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "plain_GA" in said and "plain GA" in said


def test_tables_of_nothing_are_empty(study, monkeypatch, tmp_path, capsys):
    call(study, monkeypatch, tmp_path, "--tables")
    assert capsys.readouterr().out == ""
