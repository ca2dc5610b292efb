"""The scripts under experiments/ do what their first lines say, at a tiny shape, and none imports another."""

import ast
import runpy
import sys
from pathlib import Path

import pytest
import torch

from ftp_lightning.schedule_family import ScheduleFamily

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
TINY = "--kv keep --cuts 0.3 --seeds 1 --calibration 4 --generations 1 --items 8 --windows 2".split()


def run(monkeypatch, name, *words):
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(EXPERIMENTS / name), run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "methods", "more"),
    [("schedules.py", "uniform,searched", ()), ("routers.py", "static,projected", ("--steps", 2))],
)
def test_a_cell_of_every_kind_is_measured_once_and_told_in_tables(monkeypatch, capsys, tmp_path, name, methods, more):
    words = [*TINY, "--methods", methods, *more, "--output", tmp_path]
    run(monkeypatch, name, *words)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.jsonl")}
    assert {path.stem for path in files} == {f"keep-0.3-0-{method}" for method in methods.split(",")}
    said = capsys.readouterr().out
    assert "### keep, story_recall: " in said and all(f"\n| {method}" in said for method in methods.split(","))
    run(monkeypatch, name, *words, "--tables")
    assert capsys.readouterr().out in said and files == {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.slow
def test_decode_policies_are_compared(monkeypatch, capsys, tmp_path):
    from ftp_lightning import DynamicRouter, Schedule, TokenPruner

    torch.manual_seed(0)
    TokenPruner(DynamicRouter(), Schedule.default(12, 0.3)).save(tmp_path / "pruned")
    words = ["--pruned", tmp_path / "pruned", "--tasks", "story_recall", "--items", 4, "--windows", 2]
    run(monkeypatch, "decode_sensitivity.py", *words, "--policies", "dense,threshold 0.3", "--output", tmp_path / "out")
    rows = [line.split(" | ")[0].strip("| ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[1:] == ["dense", "threshold 0.3"]


@pytest.mark.slow
def test_the_promise_of_tune_is_checked_on_other_documents(monkeypatch, capsys, tmp_path):
    words = ["--population", 60, "--limit", 34, "--new_tokens", 3, "--keep", 0.3, "--repetitions", 1]
    run(monkeypatch, "promise.py", *words, "--output", tmp_path)
    said = capsys.readouterr().out
    assert "answers to fresh prompts, held" in said and "held in 1 of 1 tunings" in said


@pytest.mark.slow
def test_the_ablation_says_what_a_variant_adds_and_goes_on(monkeypatch, capsys, tmp_path):
    words = ["--model", "embedded", "--limit", 34, "--prompt_tokens", 48, "--new_tokens", 6, "--output", tmp_path]
    words += ["--variants", "uniform;late blocks;late blocks, fitted"]
    run(monkeypatch, "ablation_real.py", *words)
    said = capsys.readouterr().out
    assert "| late blocks minus uniform |" in said and "| late blocks, fitted minus late blocks |" in said
    monkeypatch.setattr("ftp_lightning.tuning.measured.evaluate_rows", None)  # nothing is measured twice
    run(monkeypatch, "ablation_real.py", *words)
    assert capsys.readouterr().out.split("\n\n")[1] == said.split("\n\n")[1]


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.py")), ids=lambda path: path.name)
def test_an_experiment_is_short_and_stands_alone(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 80
    imported = {
        alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {str(node.module) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert not imported & {other.stem for other in EXPERIMENTS.rglob("*.py")} and "sys.path" not in source


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_decode_skipping_says_ratio_and_limit(monkeypatch, capsys, kv):
    run(monkeypatch, "decode_skipping.py", "--model", "random:tiny", "--kv", kv, "--prompt_tokens", 40, "--steps", 4,
        "--share", 0.34)  # fmt: skip
    said = capsys.readouterr().out
    assert said.startswith(f"random:tiny float32 {kv}, 34% of the blocks skipped at 40 tokens: ")
    assert "bytes allow 1." in said


def test_published_schedules_can_be_used():
    found = sorted((EXPERIMENTS / "found").glob("*.json"))
    assert found
    for path in found:
        family = ScheduleFamily.load(path)
        assert family.num_blocks == 12
        middle = sum(family.budgets) / len(family.budgets)
        assert family.at(middle).budget == pytest.approx(middle, abs=1e-9)
