"""The command line: one message and status 2 for bad input, nothing left; settings, YAML and flags are one thing."""

import gc
import json
import shlex
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from ftp_lightning import DynamicRouter, Schedule, StaticRouter, TokenPruner
from ftp_lightning.__main__ import STAGES, hush, main, parse

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--model", "random:tiny"]
OUT = ["--output", "out"]


def refused(answer, *fragments):
    """Asserts status 2 and at most three lines on stderr that hold all fragments."""
    status, out, err = answer
    assert status == 2 and out == ""
    assert 1 <= len(err.splitlines()) <= 3, err
    for fragment in fragments:
        assert fragment in err
    assert "Traceback" not in err


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("stage", STAGES)
def test_help_answers_for_every_stage(command, stage):
    status, out, _ = command(stage, "--help")
    assert status == 0
    assert all(flag in out for flag in ("--config", "--print_config"))


def test_no_stage_and_an_unknown_one_are_told(command):
    assert command()[0] == 2
    refused(command("evalute"), "no stage 'evalute'", "evaluate")
    refused(command("sweep"), "sweep needs a study")


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["search", "--bugdet", "0.3"], ["--bugdet"]),
        (["search", "--budget", "a third"], ["budget", "a third"]),
        (["search", "--budget", "1.0"], ["budget is 1.0", "[0, 1)"]),
        (["search", "--budget=-0.1"], ["budget is -0.1", "[0, 1)"]),
        (["run", "--budget", "1.2"], ["budget is 1.2"]),
        (["search", "--budget", "0.9", "--prompt_tokens", "8"], ["cannot be reached", "0.75"]),
        (["run", "--budget", "0.9", "--prompt_tokens", "8"], ["cannot be reached"]),
        (["benchmark", "--budget", "0.9", "--lengths", "8"], ["cannot be reached"]),
        (["search", "--kv", "drop"], ["kv", "drop"]),
        (["train", "--steps", "0"], ["steps is 0"]),
        (["train", "--learning_rate", "0"], ["learning_rate is 0"]),
        (["sensitivity", "--levels", "0.6,0.3"], ["levels", "rise"]),
        (["sensitivity", "--thresholds", "0.8,1.0"], ["thresholds", "rise"]),
        (["evaluate", "--compare", "best"], ["compare", "best"]),
        (["evaluate", "--compare", "block_influence"], ["--sensitivity"]),
        (["report"], ["--run"]),
        (["prefetch"], ["--model"]),
        (["search", "--config", "missing.yaml"], ["missing.yaml"]),
        (["search", *TINY, "--schedule", "missing.json"], ["missing.json"]),
        (["evaluate", *TINY, "--pruned", "missing"], ["missing"]),
        (["search", *TINY, "--split", "tset"], ["tset", "calibration"]),
        (["search", *TINY, "--prompt_tokens", "4090"], ["4154", "4096"]),
        (["search", *TINY, "--device", "tpu"], ["tpu"]),
        (["run", *TINY, "--test_data", "missing.txt"], ["missing.txt"]),
        (["run", *TINY, "--tasks", "story_recal"], ["story_recal"]),
        (["run", *TINY, "--lengths", "64,5000"], ["benchmark", "5000", "4096", "--lengths"]),
        (["run", *TINY, "--prompt_tokens", "4090"], ["4154", "4096"]),
        (["run", *TINY, "--continuation_tokens", "1", "--prompt_tokens", "4095"], ["question", "4096"]),
        (["run", *TINY, "--tasks", "arc_easy", "--task_data", "missing"], ["arc_easy.jsonl", "--task_data"]),
        (["run", *TINY, "--apply_chat_template"], ["chat template", "random:tiny"]),
        (["evaluate", *TINY, "--apply_chat_template"], ["chat template", "random:tiny"]),
        (["run", "--model", "random:huge"], ["huge"]),
        (["run", *TINY, "--device", "tpu"], ["tpu"]),
        (["generate", *TINY, "--prompt", " "], ["prompt"]),
        (["report", "--run", "missing"], ["missing"]),
        (["search", "--model", "random:huge"], ["huge", "random:tiny"]),
        (["search", "--model", "./missing"], ["./missing"]),
        (["search", "--model", "some-org/no-such-model"], ["some-org/no-such-model", "prefetch", "HF_HUB_OFFLINE"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_gets_one_message_and_leaves_nothing(command, tmp_path, arguments, fragments):
    output = [] if arguments[0] in ("report", "prefetch") else OUT
    refused(command(*arguments, *output), *fragments)
    assert files(tmp_path) == []


def test_unknown_and_broken_config_files_are_told(command, tmp_path):
    (tmp_path / "unknown.yaml").write_text("budget: 0.4\nbugdet: 0.3\n")
    (tmp_path / "broken.yaml").write_text("budget: [0.4\n")
    refused(command("search", "--config", "unknown.yaml", *OUT), "bugdet")
    refused(command("search", "--config", "broken.yaml", *OUT), "line 1")
    assert files(tmp_path) == ["broken.yaml", "unknown.yaml"]


def test_a_folder_without_weights_is_told(command, tmp_path):
    (tmp_path / "model").mkdir()
    refused(command("search", "--model", "model", *OUT), "config.json")
    (tmp_path / "model" / "config.json").write_text("{}")
    refused(command("search", "--model", "model", *OUT), "no weights")
    assert files(tmp_path) == ["model", "model/config.json"]


@pytest.mark.parametrize("stage", ["sensitivity", "search", "train", "evaluate"])
@pytest.mark.parametrize("text", ["", "Too short a text.\n"])
def test_empty_and_short_texts_are_told(command, tmp_path, stage, text):
    (tmp_path / "text.txt").write_text(text)
    refused(command(stage, *TINY, "--data", "text.txt", *OUT), "text.txt", "words")
    assert files(tmp_path) == ["text.txt"]


def test_a_text_shorter_than_a_window_is_told(command, tmp_path):
    (tmp_path / "text.txt").write_text("A hundred words make no window of many tokens. " * 12)
    refused(command("search", *TINY, "--data", "text.txt", "--split", "all", "--prompt_tokens", 512, *OUT), "tokens")
    assert files(tmp_path) == ["text.txt"]


def test_run_tries_every_split_before_it_writes(command, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join("The old man walked to the river and looked." for _ in range(90)))
    refused(command("run", *TINY, "--data", "text.txt", *OUT), "text.txt", "'validation'", "tokens")
    text = ["--test_data", "text.txt", "--prompt_tokens", 400]
    refused(command("run", *TINY, *text, *OUT), "text.txt", "'test'", "tokens")
    assert files(tmp_path) == ["text.txt"]


@pytest.mark.parametrize("prompt", ["# Once", "null", "12", "a: b", "[x"])
def test_a_prompt_is_text_whatever_yaml_makes_of_it(prompt):
    assert parse("generate", ["--prompt", prompt]).prompt == prompt


def test_libraries_are_hushed_but_for_warnings():
    import logging

    assert main(["--version"]) == 0
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
    assert not logging.getLogger("lm_eval.evaluator").isEnabledFor(logging.WARNING)
    tokenizers = logging.getLogger("transformers.tokenization_utils_base")
    for text, shown in (("Token indices sequence length is longer than", False), ("another warning", True)):
        record = tokenizers.makeRecord(tokenizers.name, logging.WARNING, "", 0, text, (), None)
        assert bool(tokenizers.filter(record)) is shown


def test_a_resumed_training_is_not_told_that_its_folder_is_not_empty():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hush()
        warnings.warn("Checkpoint directory runs/train/checkpoints exists and is not empty.", stacklevel=1)
        warnings.warn("another warning", stacklevel=1)
    assert [str(one.message) for one in shown] == ["another warning"]


def test_a_broken_line_of_jsonl_is_named(command, tmp_path):
    row = json.dumps({"text": "word " * 60})
    (tmp_path / "data.jsonl").write_text(f"{row}\n{row}\n{{broken\n{row}\n")
    refused(command("search", *TINY, "--data", "data.jsonl", *OUT), "data.jsonl", "line 3")
    assert files(tmp_path) == ["data.jsonl"]


@pytest.mark.parametrize("stage", ["search", "train", "evaluate", "benchmark", "generate"])
def test_a_schedule_of_another_block_count_is_told(command, tmp_path, stage):
    Schedule.uniform(5, 0.3).save(tmp_path / "five.json")
    refused(command(stage, *TINY, "--schedule", "five.json", *OUT), "five.json", "5 blocks", "has 3")
    assert files(tmp_path) == ["five.json"]


@pytest.mark.parametrize("stage", ["search", "evaluate", "benchmark", "generate"])
def test_pruners_of_another_model_or_shape_are_told(command, tmp_path, stage):
    TokenPruner(DynamicRouter(), Schedule.uniform(5, 0.3)).save(tmp_path / "five")
    refused(command(stage, *TINY, "--pruned", "five", *OUT), "5 blocks", "has 3")
    TokenPruner(DynamicRouter(), Schedule.uniform(3, 0.3)).save(tmp_path / "three")
    save_file({"mlp.0.weight": torch.zeros(8, 4)}, tmp_path / "three" / "router.safetensors")
    refused(command(stage, *TINY, "--pruned", "three", *OUT), "another shape")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["sensitivity", "search", "train", "evaluate", "benchmark", "generate", "run"])
def test_an_unwritable_output_folder_is_told_before_any_work(command, tmp_path, stage):
    (tmp_path / "file").write_text("not a folder")
    refused(command(stage, *TINY, "--output", "file/out"), "file/out", "--output")
    assert files(tmp_path) == ["file"]


def test_config_files_stack_and_flags_win(tmp_path):
    (tmp_path / "a.yaml").write_text("budget: 0.4\nkv: evict\n")
    (tmp_path / "b.yaml").write_text("budget: 0.5\n")
    settings = parse("search", ["--config", f"{tmp_path}/a.yaml", "--config", f"{tmp_path}/b.yaml", "--seed", "3"])
    assert (settings.budget, settings.kv, settings.seed) == (0.5, "evict", 3)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("report", "prefetch", "doctor")])
def test_print_config_can_be_read_back(command, tmp_path, stage):
    given = {"serve": ["--port", "8001"], "export": ["--pruned", "embedded", "--output", "folder"]}.get(
        stage, ["--seed", "5"]
    )
    status, out, _ = command(stage, *given, "--print_config")
    assert status == 0
    (tmp_path / "config.yaml").write_text(out)
    assert parse(stage, ["--config", str(tmp_path / "config.yaml")]) == parse(stage, given)


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        ("sensitivity", ["--levels", "0.2,0.8", "--overwrite"]),
        ("search", ["--budget", "0.45", "--patience", "3"]),
        ("evaluate", ["--tasks", "arc_easy,story_name", "--compare=random,uniform", "--limit", "5"]),
        ("generate", ["--prompt", 'He said: "it\'s so".\nWhy?']),
        ("run", ["--lengths=128", "--tracking", "none"]),
    ],
)
def test_the_recorded_command_and_config_give_the_same_settings(tmp_path, stage, arguments):
    settings = parse(stage, arguments)
    assert parse(stage, shlex.split(settings.command())[2:]) == settings
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings.config()))
    assert parse(stage, ["--config", str(tmp_path / "config.yaml")]) == settings


def test_stage_flags_have_the_defaults_of_what_they_set():
    from ftp_lightning.cli.settings import picked
    from ftp_lightning.lit.training_settings import TrainingSettings
    from ftp_lightning.search.genetic import SearchSettings

    assert picked(TrainingSettings, parse("train", [])) == TrainingSettings()
    assert picked(SearchSettings, parse("search", [])) == SearchSettings(budget=0.3)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.name)
def test_every_study_asks_a_question_and_its_command_parses(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    question, told = path.read_text(encoding="utf-8").splitlines()[:2]
    assert question.startswith("# ") and question.endswith("?")
    program, stage, *arguments = shlex.split(told.removeprefix("# "))
    assert program == "ftp-lightning" and f"experiments/{path.name}" in arguments
    settings, default = parse(stage, arguments), parse(stage, [])
    changed = {
        field.name for field in fields(settings) if getattr(settings, field.name) != getattr(default, field.name)
    }
    said = {word.removeprefix("--") for word in arguments if word.startswith("--")} - {"config"}
    assert changed == set(yaml.safe_load(path.read_text(encoding="utf-8"))) | said  # only the differences


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.name)
def test_every_sweep_uses_the_flags_of_its_stage(path):
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    stage = sweep["command"][sweep["command"].index("ftp_lightning") + 1]
    for name, values in sweep["parameters"].items():
        for value in values.get("values", [values.get("value", values.get("min"))]):
            assert parse(stage, [f"--{name}={value}"]) is not None


def test_the_command_line_looks_for_garbage_seldom(capsys):
    before = gc.get_threshold()
    try:
        gc.set_threshold(700, 10, 10)
        assert main(["--version"]) == 0 and gc.get_threshold()[0] >= 10_000
    finally:
        gc.set_threshold(*before)


def test_main_tells_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.count(".") == 2


EARLY = {
    "least_tokens": (["generate", "--least_tokens", "few"], "least_tokens is 'few'"),
    "broken pruner": (["generate", "--pruned", "broken"], "broken"),
    "broken pruner, evaluate": (["evaluate", "--pruned", "broken"], "broken"),
    "broken schedule": (["benchmark", "--schedule", "broken/pruner.json"], "broken"),
    "nothing to train": (["train", "--pruned", "static", "--tracking", "none"], "has nothing to train"),
}


@pytest.mark.parametrize("name", EARLY)
def test_what_can_be_refused_without_the_model_is(command, monkeypatch, name):
    def loaded(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("ftp_lightning.models.load", loaded)
    Path("broken").mkdir()
    Path("broken/pruner.json").write_text("{")
    TokenPruner(StaticRouter(), Schedule([0.0, 0.3, 0.6])).save("static")
    words, said = EARLY[name]
    refused(command(*words, *TINY, *OUT, "--device", "cpu"), said)
