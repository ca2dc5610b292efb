"""Stage `train` end to end: rows of both kinds, families, variants; what it refuses."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from ftp_lightning import Schedule, TokenPruner, UserError
from ftp_lightning.schedule_family import ScheduleFamily
from ftp_lightning.stages.train import TrainStage

SMALL = {"steps": 2, "batch_size": 2, "validations": 1, "validation_windows": 2, "tracking": "none", "device": "cpu"}
SMALL |= {"prompt_tokens": 48, "continuation_tokens": 16}


def train(folder, **changes):
    TrainStage(**SMALL | {"output": str(folder)} | changes).execute()
    return json.loads((folder / "metrics.json").read_text()), TokenPruner.load(folder / "pruned")


def records(path):
    rows = [
        {"instruction": f"Say {n} in words, please.", "input": "", "output": f"This is {n}." * (n % 3)}
        for n in range(90)
    ]
    path.write_text(json.dumps(rows))
    return str(path)


def family(path):
    blocks = 12
    ScheduleFamily([Schedule.uniform(blocks, 0.2), Schedule.uniform(blocks, 0.6)]).save(path)
    return str(path)


def test_prompts_are_counted_and_trained_on(tmp_path):
    about = {"data": records(tmp_path / "r.json"), "rows": "prompts", "prompt_tokens": 192}
    metrics, pruner = train(tmp_path / "run", **about, budget=0.3)
    assert len(metrics["steps"]) == 2 and metrics["empty_response"] > 0 and metrics["rows"] == 4
    assert pruner.schedule.budget == pytest.approx(0.3)


def test_a_family_and_a_variant(tmp_path):
    about = {"schedule": family(tmp_path / "schedules.json"), "budgets": (0.2, 0.6), "router": "recurrent"}
    metrics, pruner = train(tmp_path / "run", **about, window=16, random_prompt=True, gates="gumbel")
    assert pruner.schedule.budget == pytest.approx(0.4) and pruner.window == 16
    assert metrics["parameters"] == pruner.router.parameter_count != 450


@pytest.mark.parametrize(
    "bad,said",
    [
        ({"budgets": (0.2, 0.6)}, "schedules.json"),
        ({"rows": "examples", "random_prompt": True}, "random_prompt"),
        ({"factors": ("colour",)}, "colour"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, bad, said):
    with pytest.raises(UserError, match=said):
        train(tmp_path / "run", budget=0.3, **bad)
    assert not (tmp_path / "run").exists()


def test_budgets_beyond_the_family_or_the_wrong_way_round_are_told(tmp_path):
    path = family(tmp_path / "schedules.json")
    for budgets, said in (((0.6, 0.2), "lowest"), ((0.2, 0.8), "at most 0.6"), ((0.2,), "lowest")):
        with pytest.raises(UserError, match=said):
            train(tmp_path / "run", schedule=path, budgets=budgets)


@pytest.mark.slow
def test_the_command_stopped_by_a_signal_goes_on(tmp_path):
    command = [sys.executable, "-m", "ftp_lightning", "train", "--budget=0.3", "--steps=12", "--batch_size=2"]
    command += ["--validations=3", "--validation_windows=2", "--tracking=none", "--device=cpu", "--dtype=float64"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, f"--output={tmp_path / 'whole'}"], check=True, **quiet)
    stopped = subprocess.Popen([*command, f"--output={tmp_path / 'stopped'}"], **quiet)
    history, deadline = tmp_path / "stopped" / "checkpoints" / "history.jsonl", time.monotonic() + 120
    while not (history.exists() and history.read_text().count("total") >= 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 128 + signal.SIGTERM
    assert not (tmp_path / "stopped" / "provenance.json").exists()
    subprocess.run([*command, f"--output={tmp_path / 'stopped'}"], check=True, **quiet)
    for name in ("metrics.json", "pruned/router.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_by_a_flag(tmp_path):
    """Also where each holds half of every block, and what a skipped token gets is fitted by both."""
    whole, sharded = ({"budget": 0.3, "processes": 2, "skip": "mean", "shard": shard} for shard in (False, True))
    metrics, pruner = train(tmp_path / "run", **whole)
    assert len(metrics["steps"]) == 2 and metrics["steps"][0]["seen"] == 2 * 2 * 64
    assert pruner.router.parameter_count == 450
    same, other = train(tmp_path / "sharded", **sharded)
    assert same["best_validation_kl"] == pytest.approx(metrics["best_validation_kl"], rel=1e-4)
    for one, two in zip(pruner.router.parameters(), other.router.parameters()):
        assert torch.allclose(one, two, atol=1e-5)
    records = [json.loads((tmp_path / name / "pruned" / "pruner.json").read_text()) for name in ("run", "sharded")]
    assert records[0]["base_identity"] == records[1]["base_identity"]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A trained pruner, and the folder it is in."""
    folder = tmp_path_factory.mktemp("first")
    return train(folder / "run", budget=0.3, router="local", kv="evict")[1], str(folder / "run" / "pruned")


def test_it_goes_on_from_a_pruner(first, tmp_path):
    first, folder = first
    _, second = train(tmp_path / "second", pruned=folder, learning_rate=1e-9)
    assert second.schedule == first.schedule and second.kv == first.kv
    for one, two in zip(first.router.parameters(), second.router.parameters()):
        assert torch.allclose(one, two, atol=1e-6)
    with pytest.raises(UserError, match="--router cannot be combined"):
        train(tmp_path / "third", pruned=folder, router="local")


def test_the_router_is_first_trained_where_every_block_decides(tmp_path):
    about = {"router": "projected", "guide": "future", "guide_share": 1.0, "guide_decay": "constant"}
    metrics, pruner = train(tmp_path / "run", budget=0.5, dense=2, **about)
    assert pruner.schedule.sparsity == pytest.approx([0.0, 0.0, *[0.6] * 10])
    assert metrics["parameters"] == 12 * 256 + 17 * 64 + 130


def test_a_family_goes_on_from_a_pruner(first, tmp_path):
    """The schedule it holds afterwards is the family's, of the middle budget."""
    about = {"schedule": family(tmp_path / "schedules.json"), "budgets": (0.2, 0.6)}
    _, pruner = train(tmp_path / "second", pruned=first[1], **about)
    assert pruner.schedule.sparsity == pytest.approx([0.4] * 12)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"budget": 0.9, "dense": 2}, "leave no room"), ({"budget": 0.3, "dense": 12}, "leave no room")],
)
def test_dense_blocks_that_leave_no_room_are_refused(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", **given)
    assert not (tmp_path / "run" / "pruned").exists()


def test_dense_blocks_beside_a_schedule_are_refused(tmp_path):
    Schedule.uniform(12, 0.3).save(tmp_path / "schedule.json")
    with pytest.raises(UserError, match="--dense makes a uniform schedule"):
        train(tmp_path / "run", schedule=str(tmp_path / "schedule.json"), dense=1)


def test_untrained_router_with_a_distilled_map(tmp_path):
    about = {"router": "untrained", "factors": ("rank",), "budget": 0.3, "skip": "low-rank", "skip_windows": 2}
    fitted, before = train(tmp_path / "fitted", **about)
    metrics, after = train(tmp_path / "run", **about, distil_epochs=1, distil_windows=2)
    assert fitted["parameters"] == metrics["parameters"] == 0 and "distillation" not in fitted
    assert [row["epoch"] for row in metrics["distillation"]["epochs"]] == [0, 1]
    assert after.router.names == ("rank",) and after.compensation.rank == 8
    assert after.compensation.digest() != before.compensation.digest() or metrics["distillation"]["validation_kl"] > 0
    for bad, said in (
        ({"distil_epochs": 1}, "they get nothing"),
        ({"router": "static"}, "has nothing to train"),
        ({"distil_epochs": 1, "skip": "mean", "processes": 2}, "one process"),
    ):
        with pytest.raises(UserError, match=said):
            TrainStage(**SMALL | bad).check()
