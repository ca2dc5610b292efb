"""One router for all budgets, beside those of each: a tiny study end to end, gone on with; and what training costs."""

import json
import sys

import pytest
from pictures import shows_something
from scripts import script

from ftp_lightning import ScheduleFamily, TokenPruner

TINY = """--budgets 0.3,0.6 --anchors 0.6 --range 0.2,0.6 --seeds 0 --items 12 --windows 2 --calibration_windows 4
--steps 1 --longer 2 --tokens 4000 --dtype bfloat16"""
METHODS = "static; static, ramp; untrained, ramp; dynamic, one; dynamic, one, longer; dynamic, own"


@pytest.fixture(scope="module")
def study():
    return script("experiments/one_router.py")


def call(study, monkeypatch, folder, methods, *more):
    given = [*TINY.split(), "--methods", methods, "--output", str(folder), *more]
    monkeypatch.setattr(sys, "argv", ["one_router.py", *given])
    study.main()


@pytest.mark.slow
def test_one_router_serves_all_budgets_and_moves_to_another_study(study, monkeypatch, tmp_path, capsys):
    call(study, monkeypatch, tmp_path / "a", METHODS)
    family = ScheduleFamily.load(tmp_path / "a" / "family-keep.json")
    assert family.budgets == pytest.approx((0.6,))
    cells = {b: json.loads((tmp_path / "a" / f"keep-{b}-0.json").read_text()) for b in (0.3, 0.6)}
    for budget, cell in cells.items():
        assert list(cell) == METHODS.split("; ")
        for name, row in cell.items():
            assert sum(row["sparsity"]) / 12 == pytest.approx(budget, abs=1e-9)
            if "ramp" not in name:
                assert row["sparsity"] == pytest.approx(family.at(budget).sparsity)
        assert [row["parameters"] for row in cell.values()] == [0, 0, 0, 450, 450, 450]
    one = [cells[budget]["dynamic, one"]["training"] for budget in (0.3, 0.6)]
    assert one[0] == one[1] and one[0]["validation"]  # one training for both
    assert cells[0.3]["dynamic, own"]["training"] != cells[0.6]["dynamic, own"]["training"]
    folders = sorted(path.name for path in (tmp_path / "a" / "routers").iterdir())
    assert folders == [f"keep-0-dynamic-{how}" for how in ("one", "one-longer", "own-0.3", "own-0.6")]
    written = (tmp_path / "a" / "keep-0.6-0.json").stat().st_mtime_ns
    call(study, monkeypatch, tmp_path / "a", METHODS)  # nothing is done again
    assert (tmp_path / "a" / "keep-0.6-0.json").stat().st_mtime_ns == written
    shown = capsys.readouterr().out
    assert "| dynamic, one - dynamic, own |" in shown and "| untrained, ramp | 0 |" in shown
    assert shows_something(tmp_path / "a" / "one_router-keep.png")
    moved = ["--budgets", "0.3", "--transfer", str(tmp_path / "a"), "--family", str(tmp_path / "a/family-keep.json")]
    call(study, monkeypatch, tmp_path / "b", "dynamic, transferred", *moved)
    there = json.loads((tmp_path / "b" / "keep-0.3-0.json").read_text())["dynamic, transferred"]
    assert there["held"] == cells[0.3]["dynamic, own"]["held"]  # the same model here: the same router, the same numbers
    assert TokenPruner.load(tmp_path / "a/routers/keep-0-dynamic-own-0.3/pruned").router.parameter_count == 450


def test_what_cannot_be_asked_is_refused(study, monkeypatch, tmp_path, capsys):
    for methods, more, told in (
        ("oracle", [], "no method oracle"),
        ("static", ["--range", "0.2,0.8"], "--range goes up to 0.8"),
    ):
        with pytest.raises(SystemExit) as left:
            call(study, monkeypatch, tmp_path, methods, *more)
        assert left.value.code == 2 and told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_cost_is_told_in_forwards(monkeypatch, tmp_path, capsys):
    cost = script("experiments/training_cost.py")
    given = [
        "--model",
        "random:tiny",
        "--steps",
        "3",
        "--repeats",
        "1",
        "--routers",
        "dynamic; one_pass",
        "--output",
        str(tmp_path / "cost.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["training_cost.py", *given])
    cost.main()
    rows = json.loads((tmp_path / "cost.json").read_text())
    assert list(rows) == ["dynamic", "one_pass"] and rows["dynamic"]["parameters"] == 450
    assert all(row["forwards"] > 1 and row["tokens"] == 1024 and row["peak"] > 0 for row in rows.values())
    assert "| dynamic | 450 |" in capsys.readouterr().out


def test_a_router_that_the_other_study_has_not_trained_is_left_out(study, tmp_path):
    args = study.argparse.Namespace(methods=["static", "dynamic, transferred"], transfer=tmp_path, output=tmp_path)
    (tmp_path / "routers/keep-0-dynamic-own-0.3/pruned").mkdir(parents=True)
    assert study.missing(args, "keep", 0.3, 0, {}) == args.methods
    assert study.missing(args, "keep", 0.6, 0, {}) == ["static"]
    assert study.missing(args, "keep", 0.3, 0, {"static": {}}) == ["dynamic, transferred"]
