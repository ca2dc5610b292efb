"""`ftp-lightning try`: both answers, the prompt in colours that say which blocks computed what, on any model."""

import io
import json

import pytest
from rich.console import Console

from ftp_lightning import Schedule, StaticRouter, TokenPruner
from ftp_lightning.__main__ import parse
from ftp_lightning.cli.coloured import SCALE, coloured, legend, print_continued, style_of
from ftp_lightning.disk.ready import READY
from ftp_lightning.models import load_model
from ftp_lightning.stages.first_look import OWN, REAL, SMALL_BUDGET, default_model
from ftp_lightning.stages.generate import Continued

TINY = ["--model", "random:tiny", "--max_new_tokens", "2", "--pairs", "1"]
WORDS = "The old man walked to the river and looked at the water for a long while."


def made_up(short: bool = False, pruned_ms: float = 20.0) -> Continued:
    texts = {"dense": " Paris.", "pruned": " [b]Rome."}
    return Continued(
        "a b c", ["a", " b", " [c]"], texts, [0, 1, 2], [3, 2, 1], {"dense": 30.0, "pruned": pruned_ms}, 1.6, short
    )


def shown(found: Continued, **about) -> str:
    console = Console(width=100, highlight=False, file=io.StringIO(), **about)
    print_continued(found, "m", "p", console)
    return console.file.getvalue()


def test_words_are_the_prompt_and_both_answers_are_printed(command, tmp_path):
    status, out, err = command("try", *TINY, *WORDS.split(), "--least-tokens", "0")
    assert status == 0, err
    assert WORDS in " ".join(out.split()) and "dense answer" in out and "pruned answer" in out
    found = json.loads((tmp_path / "runs/try/generation.json").read_text())
    assert found["prompt"] == WORDS and sum(found["skipped"]) > 0
    assert command("try", *TINY, "again, which is written anew")[0] == 0


def test_a_short_prompt_is_told_to_gain_nothing(command):
    status, out, _ = command("try", *TINY, "short")
    assert status == 0 and "too short to gain anything" in out and "0% of the" in out


def test_the_prompt_is_given_once(command):
    status, _, err = command("try", *TINY, "--prompt", "one", "two")
    assert status == 2 and "given twice" in err


@pytest.mark.parametrize("words", [(), ("with", "words")])
def test_the_settings_name_a_model_and_give_themselves_again(words):
    settings = parse("try", [*words])
    assert settings.model == default_model() and settings.model in (REAL, OWN)
    assert settings.prompt == (" ".join(words) or None) and settings.words == ()
    assert parse("try", settings.command().split()[2:] if not words else ["--prompt", "with words"]) == settings


def test_colours_say_how_many_blocks_computed_a_token():
    text = coloured(made_up())
    assert text.plain == "a b [c]"
    assert [span.style for span in text.spans] == [style_of(1.0), style_of(2 / 3), style_of(1 / 3)]
    assert len({style for _, style in SCALE}) == len(SCALE)
    assert legend(made_up()).plain == "computed by so many of the 3 blocks:  0-1  1 token   2  1 token   3  1 token  "


def test_times_answers_and_limit_are_printed():
    out = shown(made_up())
    assert "dense 30 ms, pruned 20 ms: 1.50 times as fast" in out and "1.60" in out and "[b]Rome." in out
    assert "33%" in out and "too short" not in out and "a b [c]" in out
    assert "\x1b[" in shown(made_up(), force_terminal=True, color_system="truecolor") and "\x1b[" not in out
    assert "too short" in shown(made_up(short=True)) and "gained no time" not in out
    assert "gained no time here: a prompt of 3 tokens" in shown(made_up(pruned_ms=40.0))


def test_a_ready_made_pruner_is_preferred():
    def chosen(*flags):
        settings = parse("try", ["--model", "embedded", *flags])
        return settings.chosen(load_model("embedded")), settings._pruner_name()

    own, name = chosen()
    assert own.schedule.budget == pytest.approx(TokenPruner.load(READY / "embedded").schedule.budget)
    assert name == "ready-made for this model"
    asked, name = chosen("--budget", "0.1")
    assert asked.schedule.budget == pytest.approx(0.1) and name == "ready-made for this model, at budget 0.1"
    assert asked.schedule.sparsity == own.at(0.1).schedule.sparsity
    far, name = chosen("--budget", "0.9")  # beyond the family
    assert far.schedule.budget == pytest.approx(0.9) and name == "the default schedule, budget 0.9"
    settings = parse("try", TINY)
    assert settings.chosen(load_model("random:tiny")).schedule.budget == pytest.approx(SMALL_BUDGET)
    assert settings._pruner_name() == f"the default schedule, budget {SMALL_BUDGET}"


def test_a_pruner_brings_its_model(tmp_path):
    TokenPruner(StaticRouter(), Schedule.default(3, 0.4)).save(tmp_path / "p", base="random:tiny")
    TokenPruner(StaticRouter(), Schedule.default(3, 0.4)).save(tmp_path / "without")
    for stage in ("generate", "evaluate", "benchmark", "search", "train"):
        assert parse(stage, ["--pruned", str(tmp_path / "p")]).model == "random:tiny"
        assert parse(stage, ["--pruned", str(tmp_path / "p"), "--model", "other/one"]).model == "other/one"
        assert parse(stage, ["--pruned", str(tmp_path / "without")]).model == "embedded"
