"""`ftp-lightning doctor`: what it reports is true, what is missing has a remedy, and nothing is written."""

import json
import sys

import pytest
import torch

from ftp_lightning import machine
from ftp_lightning.errors import UserError


def test_the_report_tells_this_machine(command, tmp_path):
    status, out, err = command("doctor", "--json")
    found = json.loads(out)
    assert status == 0 and not err and not list(tmp_path.iterdir())
    assert found["packages"]["torch"] == torch.__version__
    assert found["machine"]["cores"] >= 1 and found["machine"]["gflops"] > 0
    assert found["models"]["embedded"] and set(found["models"]) == {"embedded", "smollm2-135m-instruct", "gemma3-270m"}
    assert all(set(problem) == {"what", "remedy"} for problem in found["problems"])


def test_what_is_missing_is_told_with_its_remedy(command, monkeypatch):
    def missing(name, revision=None):
        raise UserError("not here")

    versions = {"torch": "2.1.0", "wandb": None, "gguf": "0.19", "torchao": None}
    monkeypatch.setattr("ftp_lightning.models.title", missing)
    monkeypatch.setattr(machine, "version_of", lambda name: versions.get(name, "4.9"))
    monkeypatch.setattr(
        machine.metadata, "requires", lambda name: ["torch>=2.6", "wandb>=0.19", 'peft>=9; extra == "x"']
    )
    status, out, _ = command("doctor")
    assert status == 0 and "To do" in out
    assert "torch 2.1.0 is installed, >=2.6 is needed: pip install 'torch>=2.6'" in out
    assert "wandb is not installed: pip install 'wandb>=0.19'" in out
    assert "the model gemma3-270m is not installed: make models" in out
    assert "peft 4.9 is" not in out and "torchao          not installed (optional: quantised models)" in out


def test_little_memory_and_disk_are_told():
    small = machine._small({"memory_gb": 2.0, "disk_free_gb": 0.5})
    assert [problem["what"] for problem in small] == ["2.0 GB of memory are little", "0.5 GB of disk are free"]
    assert machine._small({"memory_gb": 16.0, "disk_free_gb": 50.0}) == []


def test_a_package_that_is_not_installed_is_a_sentence(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftp_lightning.machine", None)
    with pytest.raises(ModuleNotFoundError):  # our own modules are never missing
        command("doctor")
    monkeypatch.setitem(sys.modules, "ftp_lightning.machine", machine)
    monkeypatch.setitem(sys.modules, "psutil", None)
    status, _, err = command("doctor")
    assert status == 2 and err.startswith("the package psutil is not installed\nRun `pip install .`")
