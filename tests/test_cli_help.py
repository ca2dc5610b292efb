"""What a person reads on the command line: the map of stages, help in groups, messages, completion."""

import shutil
import subprocess

import pytest

from ftp_lightning.__main__ import STAGES, main, parse, settings_of
from ftp_lightning.cli.flags import ALWAYS, GROUPS, IMPORTANT, SHOWN, flags_of, grouped, important
from ftp_lightning.cli.help import MORE, SECTIONS, stage_help, stage_map

TINY = ["--model", "random:tiny"]


def flags_in(text: str) -> set[str]:
    rows = [line for line in text.splitlines() if line.startswith(("  --", "    --"))]
    return {line.split()[0].removeprefix("--") for line in rows}


def test_the_map_names_every_stage_once(command):
    status, out, _ = command()
    assert status == 2 and command("--help")[0] == 0
    starts = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and line[2:3].strip()]
    assert all(starts.count(stage) == 1 for stage in STAGES)


def test_a_stage_without_a_heading_is_shown_under_more():
    text = stage_map({"run": ("RunStage", "the chain"), "teleport": ("T", "somewhere else")})
    assert text.index(f"\n{MORE}\n") < text.index("teleport") and "Research" not in text


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_the_important_flags_and_help_all_shows_all(command, stage):
    known = set(flags_of(settings_of(stage)))
    _, short, _ = command(stage, "--help")
    _, whole, _ = command(stage, "--help-all")
    common = {"config", "print_config", "help,"}
    assert flags_in(whole) == known | common
    assert flags_in(short) == set(important(settings_of(stage))) | common
    assert len(short.splitlines()) <= 75 and max(map(len, short.splitlines())) <= 110
    assert command(stage, "--help_all")[1] == whole and command(stage, "-h")[1] == short


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_stands_in_one_group(stage):
    names = list(flags_of(settings_of(stage)))
    groups = grouped(names)
    assert sorted(name for members in groups.values() for name in members) == sorted(names)
    assert list(groups) == [group for group in GROUPS if group in groups]


def test_the_table_of_groups_names_flags_once():
    listed = [name for names in GROUPS.values() for name in names]
    assert len(listed) == len(set(listed)) and len(IMPORTANT) == len(set(IMPORTANT))
    stages = [name for names in SECTIONS.values() for name in names]
    assert len(stages) == len(set(stages)) and set(STAGES) <= set(stages)


def test_a_stage_may_name_its_own_first_flags():
    train = settings_of("train")
    own = type("Own", (train,), {"first_flags": ("lambda_d",)})
    assert "lambda_d" not in important(train)
    assert important(own)[0] == "lambda_d" and set(ALWAYS) <= set(important(own)) and len(important(own)) == SHOWN


@pytest.mark.parametrize(
    "words",
    [["--max-new-tokens", "7", "--apply-chat-template"], ["--max-new-tokens=7", "--apply-chat-template=true"],
     ["--max_new_tokens", "7", "--apply_chat-template"]],
)  # fmt: skip
def test_flags_take_hyphens_and_underscores_alike(words):
    settings = parse("generate", words)
    assert (settings.max_new_tokens, settings.apply_chat_template) == (7, True)
    assert parse("generate", ["--no-apply-chat-template"]).apply_chat_template is False


def test_hyphens_of_values_stay(tmp_path):
    assert parse("generate", ["--prompt=a--b-c"]).prompt == "a--b-c"
    assert parse("generate", ["--prompt", "a-b"]).prompt == "a-b"
    assert parse("report", ["--", "--my-run"]).runs == ("--my-run",)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serch"], ["no stage 'serch'", "Did you mean search?"]),
        (["search", "--bugdet", "0.3"], ["`search` has no flag --bugdet", "Did you mean --budget"]),
        (["trial", "--windows", "3"], ["no flag --windows", "test_windows"]),
        (["generate", "random:tiny"], ["'random:tiny' stands without a flag", "--model random:tiny"]),
        (["generate", "--budget", "30%"], ["budget is '30%', must be a number", "Give --budget 0.3."]),
        (["train", "--steps", "ten"], ["steps is 'ten', must be a whole number", "--steps"]),
        (["train", "--steps=0"], ["steps is 0, must be at least 1"]),
        (["train", "--learning_rate", "1e30"], ["learning_rate is 1e+30, must be in (0, 10]"]),
        (["search", "--seed", str(2**63)], [f"seed is {2**63}, must be in [0, "]),
        (["train", "--router", "globl"], ["router is 'globl', must be one of dynamic, local"]),
        (["train", "--router", "dynamik"], ["router is 'dynamik'", "Did you mean --router dynamic?"]),
        (["search", "--budgets", "0.2,abc"], ["budgets is '0.2,abc', must be numbers, as 0.2,0.4"]),
        (["generate", "--max_new_tokens"], ["--max_new_tokens needs a value", "a whole number"]),
        (["generate", "--apply_chat_template", "maybe"], ["apply_chat_template is 'maybe', must be true or false"]),
        (["search", "--config", "missing.yaml"], ["config file missing.yaml cannot be read"]),
        (["search", "--config=broken.yaml"], ["broken.yaml, line 1: "]),
        (["search", "--config", "list.yaml"], ["list.yaml holds no settings"]),
        (["search", "--config", "unknown.yaml"], ["unknown.yaml: `search` has no setting 'bugdet'", "budget"]),
        (["search", "--config", "value.yaml"], ["steps is 'ten', must be a whole number"]),
        (["--print_completion", "fish"], ["no completion for 'fish'", "bash or zsh"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)  # fmt: skip
def test_a_wrong_argument_is_said_in_plain_words(command, tmp_path, arguments, said):
    texts = {"broken": "budget: [0.4\n", "list": "- 1\n", "unknown": "bugdet: 0.3\n", "value": "steps: ten\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    if arguments[-1] == "value.yaml":
        arguments = ["train", *arguments[1:]]
    status, out, err = command(*arguments)
    assert status == 2 and out == "" and len(err.splitlines()) <= 3
    assert all(part in err for part in said), err
    assert not any(word in err for word in ("typing.", "<class", "Union", "Parser key", "unrecognized")), err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_names_stages_flags_and_choices(capsys, shell):
    assert main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    assert " ".join(STAGES) in script and "--max_new_tokens" in script and "float32 bfloat16" in script


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_bash_completes_by_the_script(capsys, tmp_path):
    main(["--print_completion", "bash"])
    ask = """
complete_words() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _ftp_lightning; echo "${COMPREPLY[@]}"; }
complete_words ftp-lightning sea
complete_words ftp-lightning generate --max
complete_words ftp-lightning generate --dtype bf
"""
    (tmp_path / "ask.sh").write_text(capsys.readouterr().out + ask)
    done = subprocess.run(["bash", tmp_path / "ask.sh"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["search", "--max_new_tokens", "bfloat16"]


def test_remedies_are_sentences():
    from ftp_lightning.cli.messages import shown
    from ftp_lightning.errors import UserError

    assert shown(UserError("a.txt is empty\nGive it more text")) == "a.txt is empty\nGive it more text."
    assert shown(UserError("x\n`make models` helps\n\nfour")) == "x\n`make models` helps.\n"


def test_help_names_the_folder_of_its_stage_and_no_flag_that_is_refused():
    text = stage_help(settings_of("tune"), everything=True)
    assert "by default runs/tune" in text and not {"data", "split"} & flags_in(text)
    assert {"prompts", "output"} <= flags_in(text)
