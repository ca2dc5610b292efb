"""Stage `benchmark`: the grid it measures, the files it leaves, and what it refuses before it times anything."""

import csv
import json
import os

import pytest
import torch

from ftp_lightning.__main__ import main
from ftp_lightning.evaluation.speed import prefill as speed
from ftp_lightning.evaluation.speed.cell import Bench
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import DynamicRouter, RandomRouter, StaticRouter
from ftp_lightning.schedule import Schedule
from ftp_lightning.stages.benchmark import BenchmarkStage

TINY = ("--model", "random:tiny", "--device", "cpu", "--pairs", "2", "--output", "out")

EXPECTED = """length batch kv budget speedup low high flops_limit padded_flops_limit shape_limit limit_share dense_ms
pruned_ms one_token_ms launch_bound realised_sparsity pairs overhead_share overhead_low overhead_high decode_tokens
decode_dense_ms decode_pruned_ms decode_speedup decode_low decode_high memory_dense_bytes memory_pruned_bytes
kv_bytes_dense kv_bytes_pruned mixed router attention device dtype threads""".split()


@pytest.fixture
def command(settled, capsys, monkeypatch, tmp_path):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main(["benchmark", *TINY, *arguments])
        return status, capsys.readouterr().err

    return run


def rows_of(folder):
    return json.loads((folder / "out" / "benchmark.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("modes", "budgets"), [(("keep",), (0.4,)), pytest.param(("evict", "keep"), (0.3, 0.5), marks=pytest.mark.slow)]
)
def test_the_grid_is_measured_and_csv_and_json_are_equal(command, tmp_path, modes, budgets):
    sizes = ("--lengths", "16,32", "--batches", "1,2", "--budgets", ",".join(map(str, budgets)))
    sizes += ("--modes", ",".join(modes))
    status, said = command(*sizes, "--mixed", "--decode_tokens", "2")
    assert status == 0, said
    rows = rows_of(tmp_path)
    cells = [(row["batch"], row["length"], row["budget"], row["kv"]) for row in rows]
    grid = [(b, n, s, kv) for b in (1, 2) for n in (16, 32) for s in budgets for kv in modes]
    assert [(*cell[:2], round(cell[2], 9), cell[3]) for cell in cells] == grid
    assert all(list(row) == EXPECTED for row in rows)
    assert all(row["mixed"] is (row["batch"] == 2) for row in rows)
    assert {(row["router"], row["attention"], row["dtype"], row["threads"]) for row in rows} == {
        ("dynamic", "window", "float32", 1)
    }
    with open(tmp_path / "out" / "benchmark.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert written == [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    assert (tmp_path / "out" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "out" / "metrics.json").read_text())["speedup"]) == len(rows)
    assert {"benchmark.csv", "benchmark.json", "benchmark.png", "config.yaml", "provenance.json"} <= set(
        os.listdir(tmp_path / "out")
    )


def test_without_a_grid_it_is_one_schedule_of_one_kv_mode(command, tmp_path):
    assert command("--lengths", "32", "--budget", "0.4", "--kv", "evict", "--router", "static")[0] == 0
    (row,) = rows_of(tmp_path)
    assert (row["budget"], row["kv"], row["router"]) == (pytest.approx(0.4), "evict", "static")


def test_a_stored_pruner_is_measured_with_its_own_router_and_under_all_modes(command, tmp_path):
    TokenPruner(RandomRouter(3), Schedule([0.0, 0.5, 0.7]), kv="evict", attention="exact").save(tmp_path / "pruner")
    assert command("--lengths", "32", "--pruned", "pruner", "--modes", "keep,evict")[0] == 0
    rows = rows_of(tmp_path)
    assert [row["kv"] for row in rows] == ["keep", "evict"]
    assert {(row["router"], row["attention"]) for row in rows} == {("random", "exact")}
    assert [row["budget"] for row in rows] == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--budgets", "0.3,1.2"], ["budgets", "[0, 1)"]),
        (["--budgets", "0.3,0.95", "--lengths", "16"], ["0.95", "cannot be reached"]),
        (
            ["--budgets", "0.7", "--lengths", "16", "--batches", "2", "--mixed"],
            ["0.7", "4 tokens", "cannot be reached"],
        ),
        (["--budgets", "0.3", "--budget", "0.3"], ["budgets", "--budget"]),
        (["--budgets", "0.3", "--schedule", "short.json"], ["budgets", "--schedule"]),
        (["--budgets", "0.3", "--pruned", "folder"], ["budgets", "--pruned"]),
        (["--schedule", "short.json", "--lengths", "8"], ["0.9", "cannot be reached"]),
        (["--pruned", "folder", "--router", "static"], ["router", "--pruned"]),
        (["--modes", "evict,drop"], ["modes", "drop"]),
        (["--modes", "evict", "--kv", "keep"], ["modes", "--kv"]),
        (["--lengths", "64,5000"], ["5000", "4096", "--lengths"]),
        (["--lengths", "4096", "--decode_tokens", "8"], ["4116", "4096", "--lengths"]),
        (["--lengths", "3"], ["lengths"]),
        (["--batches", "0"], ["batches"]),
        (["--batches", "1,2.5"], ["batches"]),
        (["--lengths", "8", "--batches", "2", "--mixed"], ["lengths", "16"]),
        (["--mixed"], ["mixed", "--batches"]),
        (["--decode_tokens", "1"], ["decode_tokens"]),
        (["--pairs", "1"], ["pairs"]),
        (["--router", "best"], ["router", "best"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_timed_is_refused_before_anything_is(command, tmp_path, monkeypatch, arguments, fragments):
    def timed(*_args, **_more):
        raise AssertionError("something was timed")

    monkeypatch.setattr(speed, "seconds", timed)
    Schedule.uniform(3, 0.9).save(tmp_path / "short.json")
    (tmp_path / "folder").mkdir()
    status, said = command(*arguments)
    assert status == 2 and len(said.splitlines()) <= 3, said
    assert all(fragment in said for fragment in fragments), said
    assert not (tmp_path / "out").exists()


def test_a_cell_that_does_not_fit_is_left_out_and_told(command, tmp_path, monkeypatch):
    measured = Bench.cell

    def cell(self, pruner, prompts, clock):
        if prompts.shape[1] == 32:
            raise torch.OutOfMemoryError("too much")
        return measured(self, pruner, prompts, clock)

    monkeypatch.setattr(Bench, "cell", cell)
    status, said = command("--lengths", "16,32")
    assert status == 0 and "left out 1 x 32 tokens" in said
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [row["length"] for row in found["rows"]] == [16]
    assert [(left["length"], left["reason"]) for left in found["left_out"]] == [(32, "out of memory")]
    status, said = command("--lengths", "32", "--output", "other")
    assert status == 2 and "no prompt fits" in said and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_an_interrupted_grid_goes_on_behind_the_last_size(command, tmp_path, monkeypatch):
    measured, sizes = Bench.cell, []

    def cell(self, pruner, prompts, clock):
        sizes.append(prompts.shape[1])
        if sizes.count(32) == 1 and sizes[-1] == 32:
            raise KeyboardInterrupt
        return measured(self, pruner, prompts, clock)

    monkeypatch.setattr(Bench, "cell", cell)
    assert command("--lengths", "16,32,64")[0] == 130
    assert command("--lengths", "16,32,64")[0] == 0
    assert sizes == [16, 32, 32, 64] and [row["length"] for row in rows_of(tmp_path)] == [16, 32, 64]


def test_the_untrained_router_is_seeded_and_leaves_the_global_state_alone():
    from ftp_lightning.stages.benchmark import untrained_router

    before = torch.get_rng_state()
    first, again, other = (untrained_router("auto", seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    kinds = {"auto": DynamicRouter, "dynamic": DynamicRouter, "random": RandomRouter, "static": StaticRouter}
    assert {name: type(untrained_router(name, 0)) for name in kinds} == kinds


def test_recorded_settings_give_the_same_grid(tmp_path):
    settings = BenchmarkStage(lengths=(64, 128), batches=(1, 8), budgets=(0.3, 0.7), modes=("evict",), mixed=True)
    assert settings.config()["budgets"] == [0.3, 0.7] and "--budgets=0.3,0.7" in settings.command()
