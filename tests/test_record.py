"""The record: a tiny one end to end, chosen on validation text, rivals at the same cut; finished rows stay."""

import json
import sys

import pytest
import torch
from scripts import script

from ftp_lightning import Schedule, TokenPruner, make_router
from ftp_lightning.models import load

TINY = "--items 24 --windows 2 --seeds 0 --cuts 0.1,0.2,0.9 --keep 0.01 --lengths 32 --pairs 2 --long_lengths 32"


@pytest.fixture(scope="module")
def record():
    return script("experiments/record.py")


def call(record, monkeypatch, folder, *more):
    places = ("--trained", str(folder / "trained"), "--static", str(folder), "--output", str(folder / "found"))
    monkeypatch.setattr(sys, "argv", ["record.py", *TINY.split(), *places, *more])
    record.main()


def test_the_nearest_budget_is_taken(record):
    paths = [(0.2, "a"), (0.3, "b"), (0.6, "c")]
    assert [record.nearest(paths, cut) for cut in (0.1, 0.21, 0.27, 0.45, 0.9)] == ["a", "a", "b", "c", "c"]
    with pytest.raises(SystemExit, match="routers.py"):
        record.nearest([], 0.3)


@pytest.mark.slow
def test_the_cut_is_chosen_and_everything_stands_at_it(record, monkeypatch, tmp_path, capsys):
    model, _ = load("embedded")
    blocks, size = model.config.num_hidden_layers, model.config.hidden_size
    shape = Schedule([0.0, *[0.3] * (blocks - 2), 0.9])
    (tmp_path / "keep-0.3-0.json").write_text(json.dumps({"ours": {"sparsity": list(shape.sparsity)}}))
    for kv, name in (("keep", "projected"), ("evict", "paper")):
        torch.manual_seed(0)
        router = make_router("projected" if kv == "keep" else "dynamic", blocks, size)
        TokenPruner(router, shape, kv=kv).save(tmp_path / "trained" / f"{kv}-0.3-0-{name}" / "pruned")
    with pytest.raises(ValueError, match="cannot be reached"):  # the scaled schedule leaves its zero a zero
        call(record, monkeypatch, tmp_path)
    call(record, monkeypatch, tmp_path, "--cuts", "0.1,0.2")
    chosen = json.loads((tmp_path / "found" / "chosen.json").read_text())
    assert chosen == {"projected": 0.2, "projected + rank 8": 0.2}
    rows = [json.loads(path.read_text()) for path in (tmp_path / "found").glob("test-*.json")]
    assert {row["name"] for row in rows} == {*chosen, *record.RIVALS} and {row["cut"] for row in rows} == {0.2}
    for row in rows:
        if row["name"] != "deletion, surprising":  # the look at the prompt is not charged where it is placed
            assert row["flops_cut"] == pytest.approx(0.2, abs=0.02), row["name"]
    shown = capsys.readouterr().out
    assert "### 20.0% of the prefill's FLOPs" in shown and "* 32 tokens:" in shown
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "found").glob("test-*.json")}
    call(record, monkeypatch, tmp_path, "--cuts", "0.1,0.2", "--tables")
    assert written == {path: path.stat().st_mtime_ns for path in written}
