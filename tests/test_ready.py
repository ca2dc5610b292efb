"""Ready-made pruners: they come with the package, load by name on whatever weights that name has, and say which."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from real_models import needs_model
from test_cli import TINY, refused

from ftp_lightning import Schedule, ScheduleFamily, StaticRouter, TokenPruner, UserError, load_pruned
from ftp_lightning.disk import ready
from ftp_lightning.models import load, named, title
from ftp_lightning.tuning import ready_made
from ftp_lightning.tuning.ready_made import LARGEST, make_ready

NAMES = ready.ready_names()
ROOT = Path(__file__).resolve().parents[1]


def test_there_are_ready_made_pruners():
    assert "embedded" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_ready_made_pruner_is_whole_and_its_card_is_about_it(name):
    folder, card = ready.READY / name, ready.ready_card(name)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= LARGEST
    pruner = TokenPruner.load(folder)
    assert pruner.family is not None and len(pruner.family.schedules) > 1
    assert card["name"] == name and pruner._base["base"] == name
    chosen, first = card["chosen"], card["held_out"][0]
    assert pruner.scheduled.budget == pytest.approx(chosen["budget"])
    assert chosen["kept_low"] >= card["keep"] and card["confirmed"] and first["kept"] >= card["keep"]
    assert pruner.at(chosen["budget"]).scheduled.budget == pytest.approx(chosen["budget"])
    assert name in named.NAMED or name == "embedded"
    (row,) = re.findall(rf"^\| `{re.escape(name)}` \|.*{chosen['flops_cut']:.1%}.*$", MODELS, re.M)
    assert f"{100 * chosen['kept']:.1f} %" in row


MODELS = (ROOT / "docs" / "models.md").read_text()


def test_the_embedded_one_loads_by_name_and_prunes(capsys):
    model, tokenizer = load_pruned("embedded")
    ids = torch.tensor([tokenizer.encode("Once upon a time there was a fox who lived in a wood by the river.")])
    with torch.no_grad():
        model(ids)
    assert model.pruner.trace.sparsity and capsys.readouterr().err == ""
    model.pruner.detach()


@pytest.mark.parametrize("name", [pytest.param(one, marks=needs_model(one)) for one in NAMES if one != "embedded"])
def test_a_real_one_loads_by_name(name):

    model, tokenizer = load_pruned(name)
    assert model.pruner.scheduled.budget == pytest.approx(ready.ready_card(name)["chosen"]["budget"])
    model.pruner.detach()


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A shelf of our own, with a pruner of the embedded model."""
    monkeypatch.setattr(ready, "READY", tmp_path / "ready")
    model, _ = load("embedded")
    schedules = [Schedule([0.0] * 11 + [s], kv="keep") for s in (0.5, 1.0)]
    pruner = TokenPruner(StaticRouter(), schedules[0], family=ScheduleFamily(schedules))
    pruner.save(tmp_path / "ready" / "embedded", base="embedded", model=model)
    card = {"made_from": "embedded", "chosen": {"budget": 0.5 / 12}}
    (tmp_path / "ready" / "embedded" / ready.CARD).write_text(json.dumps(card))
    return tmp_path / "ready"


def test_other_weights_of_the_same_name_are_taken_and_told(shelf, monkeypatch, capsys):
    """As SmolLM2 from the Hub under a pruner that was made from its quantised package."""
    from ftp_lightning.disk import pruned_model

    real = pruned_model.load

    def other(name, **about):
        model, tokenizer = real(name, **about)
        model.lm_head.weight.data += 0.01
        return model, tokenizer

    monkeypatch.setattr(pruned_model, "load", other)
    monkeypatch.setattr("ftp_lightning.models.title", lambda name: "embedded (another checkpoint)")
    model, _ = load_pruned("embedded")
    told = capsys.readouterr().err
    assert "was made from embedded; here it prunes embedded (another checkpoint)" in told
    model.pruner.detach()
    with pytest.raises(UserError, match="other weights"):
        TokenPruner.load(shelf / "embedded").attach(model)  # a folder is of one model alone
    with pytest.raises(UserError, match="num_blocks"):
        check = ready.load_pruner("embedded")
        check._base["base_identity"]["num_blocks"] = 13
        check.attach(model)


def test_names_without_a_pruner_and_models_that_are_not_installed_are_told(shelf, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="no ready-made pruner for gemma3-270m; there are embedded"):
        load_pruned("gemma3-270m")
    with pytest.raises(UserError, match="cannot be read"):
        load_pruned("some/folder")
    shutil.copytree(shelf / "embedded", shelf / "gemma3-270m")
    settings = shelf / "gemma3-270m" / "pruner.json"
    record = json.loads(settings.read_text()) | {"base": "gemma3-270m"}
    settings.write_text(json.dumps({key: value for key, value in record.items() if key != "sha256"}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(named, "_in_package", lambda part: None)
    with pytest.raises(UserError, match="make models"):
        load_pruned("gemma3-270m")


def test_a_folder_goes_before_a_ready_made_one(shelf, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shelf / "embedded", tmp_path / "embedded")
    assert not ready.is_ready("embedded") and ready.pruner_folder("embedded") == Path("embedded")


def test_stages_take_a_ready_made_pruner_by_name(command, tmp_path, shelf):
    about = ["generate", "--prompt", "Once upon a time", "--max_new_tokens", 1, "--pairs", 1, "--pruned", "embedded"]
    status, out, err = command(*about, "--budget", 0.06, "--output", "g")
    assert status == 0, err
    refused(command(*about, *TINY, "--output", "h"), "embedded is made for 12 blocks")


def test_a_tuning_becomes_a_ready_made_pruner(tmp_path, shelf, monkeypatch):
    folder = tmp_path / "tune"
    shutil.copytree(shelf / "embedded", folder / "pruned")
    (folder / "pruned" / ready.CARD).unlink()
    with pytest.raises(UserError, match="no finished tuning"):
        make_ready(folder, "embedded", "stories")
    (folder / "provenance.json").write_text(json.dumps({"stage": "tune", "parts": {"model": "0123"}}))
    (folder / "tune.json").write_text(json.dumps({key: key for key in ready_made._SHOWN}))
    with pytest.raises(UserError, match="tuning of embedded, not of gemma3-270m"):
        make_ready(folder, "gemma3-270m", "stories")
    assert make_ready(folder, "embedded", "stories") == shelf / "embedded"
    assert ready.ready_card("embedded")["made_from"] == title("embedded")
    monkeypatch.setattr(ready_made, "LARGEST", 10)
    with pytest.raises(UserError, match="at most 10"):
        make_ready(folder, "embedded", "stories")


def test_the_command_says_what_it_needs(tmp_path, capsys):
    assert ready_made.main([str(tmp_path)]) == 2
    assert "three arguments are needed" in capsys.readouterr().err
    assert ready_made.main([str(tmp_path), "embedded", "stories"]) == 2
    assert "no finished tuning" in capsys.readouterr().err
