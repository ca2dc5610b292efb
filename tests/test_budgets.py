"""The study of budgets: a tiny cell end to end, gone on with where it stopped, and its tables."""

import json
import sys

import pytest
from scripts import script

TINY = "--budgets 0.5 --kv keep --seeds 0 --items 24 --windows 4 --steps 2 --generations 1 --finetune_generations 1"


@pytest.fixture(scope="module")
def budgets():
    return script("experiments/budgets.py")


def call(budgets, monkeypatch, folder, *more):
    monkeypatch.setattr(sys, "argv", ["budgets.py", "--output", str(folder), *TINY.split(), *more])
    budgets.main()


@pytest.mark.slow
def test_a_cell_is_measured_once_and_told_in_tables(budgets, monkeypatch, tmp_path, capsys):
    call(budgets, monkeypatch, tmp_path)
    result = tmp_path / "keep-seed0-0.5" / "test-stories.json"
    found = json.loads(result.read_text())
    assert set(found) == {"sizes", *budgets.METHODS}
    for method in budgets.METHODS:
        assert found[method]["kept"]["items"] == sum(found[method]["need"]) > 15
        assert 0.3 < found[method]["flops_cut"] < 0.5 and 0.45 < found[method]["realised"] < 0.51
    written = result.stat().st_mtime_ns
    capsys.readouterr()
    call(budgets, monkeypatch, tmp_path)
    assert result.stat().st_mtime_ns == written
    out = capsys.readouterr().out
    assert "### 50%, `keep`, 1 seed" in out and "static, searched - uniform" in out


def test_tables_of_nothing_are_empty(budgets, monkeypatch, tmp_path, capsys):
    call(budgets, monkeypatch, tmp_path, "--tables")
    assert "### 50%" not in capsys.readouterr().out
