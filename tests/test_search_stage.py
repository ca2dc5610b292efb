"""The stage `search`: many budgets, many processes, many interruptions; and a schedule out of a family."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import refused

from ftp_lightning import Schedule, ScheduleFamily
from ftp_lightning.__main__ import parse
from ftp_lightning.stages.inputs import read_schedule

TINY = ["--model", "random:tiny", "--device", "cpu", "--tracking", "none", "--prompt_tokens", "96"]
SMALL = [*TINY, *"--windows 4 --stage_windows 2 --generations 2 --offspring 3 --survivors 2 --batch_size 2".split()]


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_many_budgets_make_a_family(command, tmp_path):
    status, _, err = command("search", *SMALL, "--budgets", "0.5,0.2", "--output", "out")
    assert status == 0, err
    family = ScheduleFamily.load("out/schedules.json")
    assert family.budgets == pytest.approx((0.2, 0.5)) and not Path("out/schedule.json").exists()
    metrics = read("out/metrics.json")
    assert list(metrics["budgets"]) == ["0.2", "0.5"] and "neighbour" in metrics["budgets"]["0.5"]["allocations"]
    # wherever a schedule is asked for the family gives the one of a budget
    assert read_schedule("out/schedules.json", 0.35).budget == pytest.approx(0.35, abs=1e-9)
    arguments = [*TINY, "--schedule", "out/schedules.json", "--output", "next"]
    refused(command("benchmark", *arguments), "budgets 0.2, 0.5", "--budget")
    refused(command("benchmark", *arguments, "--budget", "0.7"), "at most 0.5")
    assert parse("benchmark", [*arguments, "--budget", "0.3"]).budget == 0.3
    train = "--steps 1 --batch_size 1 --validations 1 --validation_windows 2 --continuation_tokens 8".split()
    status, _, err = command("train", *arguments, *train, "--budget", "0.35")
    assert status == 0, err
    assert Schedule.from_record(read("next/pruned/pruner.json")) == family.at(0.35)


def test_an_allocation_alone_is_what_is_found(command):
    for name in ("late", "greedy"):
        status, _, err = command("search", *SMALL, "--allocations", name, "--generations", "0", "--output", name)
        assert status == 0, err
        assert list(read(f"{name}/metrics.json")["allocations"]) == [name]
    assert Schedule.load("late/schedule.json").sparsity == pytest.approx((0.0, 0.0, 0.9))


def test_the_default_schedule_alone_brings_its_kv_modes(command):
    about = ("--allocations", "default", "--generations", "0", "--output")
    assert command("search", *SMALL, *about, "mixed")[0] == 0
    found, default = Schedule.load("mixed/schedule.json"), Schedule.default(3, 0.3)
    assert found.sparsity == pytest.approx(default.sparsity) and found.kv == default.kv
    assert command("search", *SMALL, *about, "keep", "--kv", "keep")[0] == 0
    kept = Schedule.load("keep/schedule.json")
    assert kept.kv == ("keep",) * 3 and kept.sparsity == pytest.approx(Schedule.default(3, 0.3, "keep").sparsity)


@pytest.mark.parametrize("criterion", ["tv", "ce", "mse"])
def test_another_criterion_is_another_search(command, criterion):
    assert command("search", *SMALL, "--criterion", criterion, "--output", "out")[0] == 0
    assert read("out/metrics.json")["value"] > 0


@pytest.mark.slow
def test_the_accuracy_of_half_a_task_can_be_searched(command, tmp_path):
    rows = [
        {"sentence": f"The {a} did not fit into the {b} because the _ was too {c}.", "option1": a, "option2": b,
         "answer": str(1 + n % 2)}
        for n, (a, b, c) in enumerate((f"box{n}", f"bag{n}", ("big", "small")[n % 2]) for n in range(24))
    ]  # fmt: skip
    (tmp_path / "winogrande.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--criterion", "accuracy", "--task", "winogrande", "--task_data", ".", "--output", "out"]
    status, _, err = command("search", *SMALL, *more)
    assert status == 0, err
    metrics = read("out/metrics.json")
    assert 0 <= metrics["value"] <= 1 and len(metrics["items"]) == 16 and 0 < metrics["seen"]["winogrande"] < 0.5


@pytest.mark.slow
def test_two_processes_write_what_one_writes(command):
    for processes in (1, 2):
        status, _, err = command("search", *SMALL, "--processes", processes, "--output", f"out{processes}")
        assert status == 0, err
    assert Path("out1/schedule.json").read_bytes() == Path("out2/schedule.json").read_bytes()
    assert read("out1/metrics.json") == read("out2/metrics.json")
    assert read("out2/provenance.json")["files"] == read("out1/provenance.json")["files"]


@pytest.mark.slow
def test_killed_and_started_again_it_finds_the_same(tmp_path):
    more = ["--budgets", "0.2,0.5", "--generations", "6", "--offspring", "6"]

    def start(folder):
        arguments = [sys.executable, "-m", "ftp_lightning", "search", *SMALL, *more, "--output", str(tmp_path / folder)]
        return subprocess.Popen(
            arguments, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    assert start("whole").wait() == 0
    kills = 0
    while kills < 4:
        state, process = tmp_path / "killed" / "state.json", start("killed")
        before = state.read_bytes() if state.exists() else b""
        while process.poll() is None and (not state.exists() or state.read_bytes() == before):
            time.sleep(0.002)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    last = start("killed")
    _, err = last.communicate()
    assert last.returncode == 0 and (kills < 4 or "going on after generation" in err)
    for name in ("schedules.json", "metrics.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--stage_windows", "5", "--windows", "4"], ["asks for 5 calibration windows, there are 4", "--windows"]),
        (["--stage_windows", "4,2", "--survivors", "2,1"], ["stage_windows"]),
        (["--stage_windows", "2,4", "--survivors", "2"], ["one number for each stage"]),
        (["--budgets", "0.2,1.2"], ["budgets is 1.2"]),
        (["--budgets", "0.2", "--budget", "0.4"], ["--budget cannot be combined with --budgets"]),
        (["--max_sparsity", "0.2"], ["a budget of 0.3 does not fit", "0.2"]),
        (["--max_sparsity", "1,1"], ["2 values were given for 3 blocks"]),
        (["--min_sparsity", "0.9,0,0", "--max_sparsity", "0.5"], ["block 0", "0.9 to 0.5"]),
        (["--criterion", "accuracy"], ["task"]),
        (["--task", "winogrande"], ["criterion accuracy"]),
        (["--processes", "0"], ["processes is 0"]),
        (["--allocations", "latest"], ["no allocation 'latest'", "greedy"]),
        (["--allocations", "gradient"], ["gradient", "--sensitivity"]),
    ],
)
def test_what_cannot_be_searched_is_told_in_a_sentence(command, tmp_path, arguments, fragments):
    refused(command("search", *SMALL, *arguments, "--output", "out"), *fragments)
    assert list(tmp_path.iterdir()) == []
