"""The scripts under experiments/ that measure: they run as their first lines say, at a tiny shape."""

import runpy
import sys
from pathlib import Path

import pytest

from ftp_lightning.schedule_family import ScheduleFamily

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_decode_skipping_says_ratio_and_limit(monkeypatch, capsys, kv):
    arguments = ["--model", "random:tiny", "--kv", kv, "--prompt_tokens", "40", "--steps", "4", "--share", "0.34"]
    monkeypatch.setattr(sys, "argv", ["decode_skipping.py", *arguments])
    runpy.run_path(str(EXPERIMENTS / "decode_skipping.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert said.startswith(f"random:tiny float32 {kv}, 34% of the blocks skipped at 40 tokens: ")
    assert "bytes allow 1." in said


@pytest.mark.slow
def test_calibration_data_compares_kinds_of_text(monkeypatch, capsys, tmp_path):
    command = ["calibration_data.py", "--kv", "keep", "--seeds", "0", "--calibration_windows", "2", "--items", "8"]
    command += ["--windows", "2", "--output", str(tmp_path)]
    for more in ([], ["--tables"]):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        runpy.run_path(str(EXPERIMENTS / "calibration_data.py"), run_name="__main__")
        said = capsys.readouterr().out
        rows = [line.split(" | ")[0] for line in said.splitlines() if line.startswith("| ")]
        assert rows == ["| searched on", "| uniform", "| mixed", "| recall", "| stories", "| random tokens"]


def test_published_schedules_can_be_used():
    found = sorted((EXPERIMENTS / "found").glob("*.json"))
    assert found
    for path in found:
        family = ScheduleFamily.load(path)
        assert family.num_blocks == 12
        middle = sum(family.budgets) / len(family.budgets)
        assert family.at(middle).budget == pytest.approx(middle, abs=1e-9)
