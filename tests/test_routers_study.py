"""The comparison of routers: a tiny cell end to end, gone on with where it stopped, and its table."""

import json
import sys

import pytest
from scripts import script

from ftp_lightning import TokenPruner

TINY = """--budgets 0.5 --kv keep --seeds 0 --items 24 --windows 4 --calibration_windows 4 --steps 2 --tokens 4000
--methods static, searched; paper; projected"""


@pytest.fixture(scope="module")
def study():
    return script("experiments/routers.py")


def call(study, monkeypatch, folder, *more):
    methods = TINY.split("--methods ")
    given = [*methods[0].split(), "--methods", methods[1], "--static", str(folder), "--output", str(folder / "found")]
    monkeypatch.setattr(sys, "argv", ["routers.py", *given, *more])
    study.main()


@pytest.mark.slow
def test_every_router_is_measured_once_under_a_schedule_of_the_budget(study, monkeypatch, tmp_path, capsys):
    static = [0.0, 0.6, 0.9] * 4
    static[-1] = 6.0 - sum(static[:-1])
    (tmp_path / "keep-0.5-0.json").write_text(json.dumps({"ours": {"sparsity": static}}))
    call(study, monkeypatch, tmp_path)
    result = tmp_path / "found" / "keep-0.5-0.json"
    found = json.loads(result.read_text())
    assert set(found) == {"static, searched", "paper", "projected"}
    assert found["static, searched"]["sparsity"] == pytest.approx(static)
    assert [found[name]["parameters"] for name in found] == [0, 450, 12 * 256 + 17 * 64 + 130]
    assert [len(found[name]["validation"]) for name in found] == [0, 1, 2]
    for name in found:
        assert sum(found[name]["sparsity"]) / 12 == pytest.approx(0.5, abs=1e-9)
    pruner = TokenPruner.load(tmp_path / "found" / "keep-0.5-0-projected" / "pruned")
    assert list(pruner.schedule.sparsity) == found["projected"]["sparsity"]
    written = result.stat().st_mtime_ns
    shown = capsys.readouterr().out
    assert "| paper | 1 | 450 |" in shown
    call(study, monkeypatch, tmp_path)
    assert result.stat().st_mtime_ns == written


def test_a_method_that_is_none_is_refused(study, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        call(study, monkeypatch, tmp_path, "--methods", "oracle")
    assert left.value.code == 2 and "no method oracle" in capsys.readouterr().err
