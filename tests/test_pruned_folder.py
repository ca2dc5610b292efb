"""A pruner on disk: the same back, nothing half-written, strangers refused."""

import json
import os
import platform
import subprocess

import pytest
import torch
from test_engine import BLOCKS, TEXT, seeded, tiny_llama

from ftp_lightning import (
    DynamicRouter,
    FixedRouter,
    RandomRouter,
    Schedule,
    ScheduleFamily,
    StaticRouter,
    TokenPruner,
    UserError,
)
from ftp_lightning.costs.budget import budget_with_cut
from ftp_lightning.costs.request import planned_cut
from ftp_lightning.disk.pruned_folder import check_base, read_settings

SCHEDULE = Schedule([0.0, 0.25, 0.5, 0.75])


@pytest.mark.parametrize(
    "router",
    [
        StaticRouter(),
        RandomRouter(4),
        seeded(DynamicRouter),
        seeded(lambda: DynamicRouter(8, ("position", "sparsity"))),
    ],
)
def test_saved_and_loaded_prunes_the_same(tmp_path, router):
    pruner = TokenPruner(router, SCHEDULE, kv=["evict", "keep"] * 2, window=9)
    pruner.save(tmp_path / "p", base="embedded")
    again = TokenPruner.load(tmp_path / "p")
    assert again.schedule == SCHEDULE and again.settings() == pruner.settings() and type(again.router) is type(router)
    model = tiny_llama(torch.float32)
    with torch.no_grad():
        with pruner(model):
            expected = model(TEXT).logits
        with again(model):
            assert torch.equal(model(TEXT).logits, expected)
    assert sum(f.stat().st_size for f in (tmp_path / "p").iterdir()) < 100_000
    assert {f.name for f in (tmp_path / "p").iterdir()} == {"pruner.json", "router.safetensors"}


def test_saving_twice_replaces_whole(tmp_path):
    TokenPruner(StaticRouter(), SCHEDULE).save(tmp_path / "p")
    TokenPruner(StaticRouter(), Schedule.uniform(BLOCKS, 0.5)).save(tmp_path / "p")
    assert TokenPruner.load(tmp_path / "p").schedule.budget == 0.5
    assert [f.name for f in tmp_path.iterdir()] == ["p"]


def test_what_a_killed_save_has_left_goes_with_the_next_and_that_of_a_running_one_stays(tmp_path):
    dead, here = subprocess.Popen(["true"]), platform.node()
    dead.wait()
    places = [f".p.{number}@{host}.0.partial" for number, host in (
        (dead.pid, here), (os.getppid(), here), (os.getpid(), here), (dead.pid, "elsewhere"),
    )]  # fmt: skip
    for name in places:
        (tmp_path / name).mkdir()
        (tmp_path / name / "pruner.json").write_text('{"half')
    TokenPruner(StaticRouter(), SCHEDULE).save(tmp_path / "p")
    assert TokenPruner.load(tmp_path / "p").schedule == SCHEDULE
    assert {path.name for path in tmp_path.iterdir()} == {"p", *places[1:]}


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="something else"):
        TokenPruner(StaticRouter(), SCHEDULE).save(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_save_leaves_the_old_pruner(tmp_path):
    TokenPruner(StaticRouter(), SCHEDULE).save(tmp_path / "p")
    with pytest.raises(UserError, match="cannot be stored"):
        TokenPruner(FixedRouter([torch.ones(1, 3)] * BLOCKS), SCHEDULE).save(tmp_path / "p")
    assert TokenPruner.load(tmp_path / "p").schedule == SCHEDULE and len(list(tmp_path.iterdir())) == 1


def edit(folder, **changes):
    record = json.loads((folder / "pruner.json").read_text())
    (folder / "pruner.json").write_text(json.dumps(record | changes))


def test_broken_folders_are_refused_in_words(tmp_path):
    folder = tmp_path / "p"
    with pytest.raises(UserError, match="cannot be read"):
        TokenPruner.load(folder)
    TokenPruner(seeded(DynamicRouter), SCHEDULE).save(folder)
    edit(folder, router={"name": "dynamic", "width": 32, "names": ["position"]})
    with pytest.raises(UserError, match="another shape"):
        TokenPruner.load(folder)
    edit(folder, router={"name": "../../evil"})
    with pytest.raises(UserError, match="unknown"):
        TokenPruner.load(folder)
    edit(folder, router={"name": "static"}, sparsity=[2.0])
    with pytest.raises(UserError, match="must be in"):
        TokenPruner.load(folder)
    (folder / "pruner.json").write_text("{")
    with pytest.raises(UserError, match="broken"):
        TokenPruner.load(folder)
    (folder / "pruner.json").write_text("x" * 200_000)
    with pytest.raises(UserError, match="bytes"):
        TokenPruner.load(folder)


def test_truncated_weights_are_refused(tmp_path):
    TokenPruner(seeded(DynamicRouter), SCHEDULE).save(tmp_path / "p")
    weights = tmp_path / "p" / "router.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        TokenPruner.load(tmp_path / "p")


def test_foreign_files_are_never_replaced(tmp_path):
    TokenPruner(StaticRouter(), SCHEDULE).save(tmp_path / "p")
    (tmp_path / "p" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in ("p", "file"):
        with pytest.raises(UserError, match="something else"):
            TokenPruner(StaticRouter(), SCHEDULE).save(tmp_path / target)
    assert (tmp_path / "p" / "notes.txt").read_text() == "mine" == (tmp_path / "file").read_text()
    with pytest.raises(UserError, match="more than"):
        TokenPruner(DynamicRouter(5000), SCHEDULE).save(tmp_path / "big")
    assert not (tmp_path / "big").exists()


def test_another_base_model_is_refused(tmp_path):
    """The identity is that of the model the pruner was attached to; loading, saving again and attaching carry it on."""
    model, other = tiny_llama(torch.float32), tiny_llama(torch.float32, seed=1)
    pruner = TokenPruner(StaticRouter(), SCHEDULE)
    with pruner(model):
        pruner.save(tmp_path / "p", base="mine")
    loaded = TokenPruner.load(tmp_path / "p").with_schedule(Schedule.uniform(BLOCKS, 0.5))
    loaded.save(tmp_path / "q", base="mine")
    again = TokenPruner.load(tmp_path / "q")
    with again(model):
        pass
    with pytest.raises(UserError, match="another base"):
        again.attach(other)
    with pytest.raises(UserError, match="another base"):
        check_base(read_settings(tmp_path / "q"), other)


def test_a_pruner_carries_a_family_and_moves_along_it(tmp_path):
    family = ScheduleFamily([Schedule([0.0, 0.0, 0.2, 0.6], kv="keep"), Schedule([0.0, 0.2, 0.6, 1.0], kv="keep")])
    pruner = TokenPruner(StaticRouter(), family.at(0.2), family=family)
    pruner.save(tmp_path / "p")
    again = TokenPruner.load(tmp_path / "p")
    assert again.family == family and again.schedule == family.at(0.2)
    moved = again.at(0.4)
    assert moved.schedule == family.at(0.4) and moved.at(0.2).schedule == again.schedule
    assert moved.changed(decode="dense", least_tokens=8).family == family
    assert moved.changed(router=RandomRouter(1)).family is None
    with pytest.raises(UserError, match="at most 0.45"):
        again.at(0.6)
    with pytest.raises(UserError, match="one schedule alone"):
        TokenPruner(StaticRouter(), SCHEDULE).at(0.3)
    with pytest.raises(ValueError, match="family is for 4 blocks"):
        TokenPruner(StaticRouter(), Schedule([0.0, 0.5]), family=family)


def test_a_family_is_asked_for_a_cut_of_flops():
    family = ScheduleFamily([Schedule([0.0, 0.0, 0.3, 0.6], kv="keep"), Schedule([0.0, 0.3, 0.9, 1.0], kv="keep")])
    model, pruner = tiny_llama(torch.float32), TokenPruner(StaticRouter(), family.at(0.2), family=family)
    for cut in (0.0, 0.1, 0.3):
        found = pruner.at(budget_with_cut(model, pruner, cut, 1024))
        assert planned_cut(model, found, 1024) == pytest.approx(cut, abs=2e-3)
    with pytest.raises(UserError, match="cannot be reached"):
        budget_with_cut(model, pruner, 0.7, 1024)
