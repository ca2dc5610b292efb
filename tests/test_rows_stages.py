"""Stages on prompts of their own length and on own answers; what they refuse."""

import json
import random
from pathlib import Path

import pytest
from test_cli import refused

from ftp_lightning.stages.run import RunStage

WORDS = "the cat saw a dog run up the hill and then it sat down by the old mill to sleep".split()
TINY = """--model random:tiny --device cpu --tracking none --prompt_tokens 40 --continuation_tokens 4
    --data records.jsonl --split all""".split()
STAGES = {
    "sensitivity": "--windows 4 --batch_size 2 --levels 0.5",
    "search": "--windows 4 --generations 1 --offspring 2 --stage_windows 2 --survivors 1 --batch_size 2",
    "train": "--steps 1 --batch_size 2 --validations 1 --validation_windows 2 --budget 0.4",
    "evaluate": "--windows 5 --batch_size 2 --tasks [] --budget 0.4",
}


def records(**more):
    """A file of 80 prompts, of 4 to 40 words; with `more` each has that as well."""
    rng = random.Random(0)
    rows = [{"prompt": f"{n} " + " ".join(rng.choices(WORDS, k=rng.randint(4, 40)))} | more for n in range(80)]
    Path("records.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def run(command):
    return lambda stage, rows, *more: command(stage, *TINY, *STAGES[stage].split(), "--rows", rows, *more)


def read(path):
    return json.loads(Path(path).read_text())


@pytest.mark.parametrize("rows", ["prompts", "own_answers"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_prompts_of_any_length(run, stage, rows):
    records(**({"completion": "It slept."} if rows == "prompts" else {}))
    split = "training" if stage == "train" else "all"
    status, _, error = run(stage, rows, "--split", split, "--output", "out")
    assert status == 0, error
    metrics = read("out/metrics.json")
    assert 1 <= metrics["rows"] <= 5 and metrics["long_prompt"] > 0
    assert ("empty_answer" in metrics) == Path("runs/own_answers").exists() == (rows == "own_answers")
    if stage == "sensitivity":
        found = read("out/sensitivity.json")
        assert "position" not in found and found["tokens"]["prompt"] > 0
    if stage == "evaluate":
        (method,) = read("out/results.json")["methods"]
        assert 0.2 < method["realised_sparsity"] < 0.5 and 0 < method["flops_reduction"] < 0.5
        assert set(method["agreement"]) == {"first", "whole"}
        own = method["own_answers"]
        assert own is None if rows == "prompts" else own["items"] == metrics["rows"] and 0 <= own["share"] <= 1
        assert own is None or (own["share"] <= own["first"]["share"] <= 1 and own["kl"]["low"] < own["kl"]["mean"])
        assert Path("out/own_answers.csv").exists() == (own is not None)


def test_prompts_without_an_answer_get_the_models_own(run):
    records()
    assert run("evaluate", "prompts", "--output", "out")[0] == 0
    assert read("out/metrics.json")["rows"] == 5 and list(Path("runs/own_answers").iterdir())


def test_plain_text_gives_windows_and_answers_to_them(run):
    Path("book.txt").write_text(" ".join(WORDS * 60))
    assert run("evaluate", "own_answers", "--data", "book.txt", "--output", "out")[0] == 0
    assert read("out/metrics.json")["rows"] == 5


def test_wrong_prompts_are_refused(run):
    Path("records.jsonl").write_text('{"prompt": " "}')
    refused(run("evaluate", "prompts", "--output", "out"), "none has words")
    records()
    refused(run("search", "prompts", "--prompt_tokens", "5", "--output", "out"), "long_prompt 80", "--prompt_tokens")
    refused(run("search", "prompts", "--prompt_tokens", "5000", "--output", "out"), "do not fit the model's")
    refused(run("train", "prompts", "--random_prompt", "true", "--output", "out"), "--random_prompt")
    assert not Path("out").exists() and not Path("runs").exists()


def test_a_run_hands_its_rows_to_every_stage():
    stages = RunStage(rows="own_answers", own_answers="kept").stages()
    asked = {name: stage.row_flags() for name, stage in stages.items() if name != "benchmark"}
    assert len(asked) == 6 and all(one == {"rows": "own_answers", "own_answers": "kept"} for one in asked.values())
