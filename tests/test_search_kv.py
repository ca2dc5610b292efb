"""Stage `search` and kv modes: what is found is used in the mode it was found for, in every block."""

import json
from pathlib import Path

import pytest
import torch
from test_cli import refused

from ftp_lightning import Schedule, ScheduleFamily, StaticRouter, TokenPruner, UserError
from ftp_lightning.__main__ import parse
from ftp_lightning.costs.flops import flops_reduction
from ftp_lightning.models import load_model
from ftp_lightning.routing import DynamicRouter
from ftp_lightning.search.flops_budget import FlopsCut
from ftp_lightning.stages.starting_schedules import cheapest_modes

TINY = ["--model", "random:tiny", "--device", "cpu", "--tracking", "none", "--prompt_tokens", "96"]
SMALL = [*TINY, *"--windows 4 --stage_windows 2 --generations 1 --offspring 3 --survivors 2 --batch_size 2".split()]
FLOPS = ["--budget_kind", "flops", "--budget", "0.3", "--budget_length", "512"]
MIXED = ("evict", "evict", "keep")


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def stored(model, pruner, tokens=24):
    """Keys that a routed prompt leaves in every block."""
    ids = torch.randint(3, 200, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), pruner(model):
        cache = model(ids, use_cache=True).past_key_values
    return [layer.keys.shape[2] for layer in cache.layers]


@pytest.mark.parametrize("kv", ["keep", "evict"])
def test_what_was_searched_for_a_mode_computes_in_it(command, kv):
    status, _, err = command("search", *SMALL, "--budget", "0.5", "--kv", kv, "--output", "out")
    assert status == 0, err
    model, found = load_model("random:tiny"), Schedule.load("out/schedule.json")
    pruner = TokenPruner(StaticRouter(), found)
    assert pruner.kv == (kv,) * 3
    kept = [24 if kv == "keep" else 24 - round(24 * s) for s in found.sparsity]
    assert stored(model, pruner) == kept and (kv == "keep" or min(kept) < 24)


def test_searched_modes_reach_the_schedule_and_the_pruner(command, tmp_path):
    TokenPruner(DynamicRouter(), Schedule([0.3, 0.5, 0.7], MIXED)).save("pruned")
    more = ["--budget", "0.5", "--search_kv", "--pruned", "pruned", "--output", "out"]
    status, _, err = command("search", *SMALL, *more)
    assert status == 0, err
    model, found, metrics = load_model("random:tiny"), Schedule.load("out/schedule.json"), read("out/metrics.json")
    assert found.budget == pytest.approx(0.5) and set(found.kv) <= {"evict", "keep"}
    assert {"start", "late, evict", "late, keep"} <= set(metrics["allocations"])
    assert metrics["value"] <= min(metrics["allocations"].values())
    for pruner in (TokenPruner(StaticRouter(), found), TokenPruner.load("out/pruned")):
        assert pruner.kv == found.kv and pruner.schedule == found
        pruner.save("again")
        assert TokenPruner.load("again").kv == found.kv
        expected = [24 if mode == "keep" else 24 - round(24 * s) for s, mode in zip(found.sparsity, found.kv)]
        assert stored(model, pruner) == expected


def test_under_a_budget_of_flops_every_schedule_has_the_cut_in_its_own_modes(command):
    status, _, err = command("search", *SMALL, *FLOPS, "--search_kv", "--output", "out")
    assert status == 0, err
    model, found = load_model("random:tiny"), Schedule.load("out/schedule.json")
    assert flops_reduction(model, found, 512, found.kv) == pytest.approx(0.3, abs=3 / 512)
    assert read("out/metrics.json")["flops_reduction"] == pytest.approx(0.3, abs=3 / 512)


def test_the_cut_is_kept_whatever_the_modes():
    model, form = load_model("random:tiny"), (0.0, 0.2, 0.5)
    repair = FlopsCut(model, 0.3, 512)
    found = {kv: repair(Schedule(form, kv)) for kv in (("keep",) * 3, ("evict",) * 3, MIXED)}
    for kv, schedule in found.items():
        assert schedule.kv == kv and flops_reduction(model, schedule, 512, kv) == pytest.approx(0.3, abs=3 / 512)
    assert found[("evict",) * 3].budget < found[MIXED].budget < found[("keep",) * 3].budget
    last = FlopsCut(model, 0.5, 512)(Schedule([0.0, 0.0, 0.5], "keep"))  # one block cannot save so much
    assert flops_reduction(model, last, 512, "keep") == pytest.approx(0.5, abs=3 / 512) and min(last.sparsity) > 0


def test_a_family_of_searched_modes_is_written(command):
    status, _, err = command("search", *SMALL, "--budgets", "0.2,0.4", "--search_kv", "--output", "out")
    assert status == 0, err
    family = ScheduleFamily.load("out/schedules.json")
    assert all(len(schedule.kv) == 3 for schedule in family.schedules) and len(family.at(0.3).kv) == 3


@pytest.mark.slow
def test_two_processes_find_the_modes_that_one_finds(command):
    for processes in (1, 2):
        more = ["--search_kv", "--processes", processes, "--output", f"out{processes}"]
        assert command("search", *SMALL, *more)[0] == 0
    assert Path("out1/schedule.json").read_bytes() == Path("out2/schedule.json").read_bytes()
    assert read("out1/metrics.json") == read("out2/metrics.json")


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--kv", "evict"], ["--kv cannot be combined", "--search_kv"]),
        ([*FLOPS, "--max_sparsity", "0.9"], ["max_sparsity", "--search_kv"]),
        ([*FLOPS[:2], "--budgets", "0.2,0.3"], ["several FLOPs budgets", "--search_kv"]),
        ([*FLOPS[:2], "--budget", "0.97"], ["cannot be reached"]),
    ],
)
def test_what_cannot_be_kept_while_modes_change_is_told(command, tmp_path, arguments, fragments):
    refused(command("search", *SMALL, "--search_kv", *arguments, "--output", "out"), *fragments)
    assert list(tmp_path.iterdir()) == []


def test_the_cheaper_mode_of_every_block_is_one_to_start_from():
    keep, evict = [[0.1, 0.2], [0.0, 0.1]], [[0.1, 0.1], [0.3, 0.4]]
    assert cheapest_modes({"kl": keep, "kl_by_kv": {"keep": keep, "evict": evict}}) == ["evict", "keep"]
    assert cheapest_modes({"kl": keep, "kl_by_kv": {"keep": keep}}) is None and cheapest_modes(None) is None
    assert cheapest_modes({"kl": keep, "kl_by_kv": {"keep": keep, "evict": [[1, 1], [1, 1]]}}) is None


def test_a_run_of_searched_modes_measures_both_and_trains_in_what_was_found():
    stages = parse("run", [*TINY[:2], "--search_kv", "--rounds", "2"]).stages()
    assert stages["sensitivity"].kv == "both"
    searches = [stages[name] for name in ("search", "round1/finetune", "finetune", "static")]
    assert all(stage.search_kv and stage.kv == "auto" for stage in searches)
    assert stages["round1/train"].kv == stages["train"].kv == stages["evaluate"].kv == "auto"
    for more, said in ((["--kv", "evict"], "--search_kv"), (["--dense", "1"], "dense")):
        with pytest.raises(UserError, match=said):
            parse("run", [*TINY[:2], "--search_kv", *more])
