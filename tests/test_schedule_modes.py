"""A schedule is found for a kv mode: it carries the mode from the search to the pruner that uses it."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_cli import refused

from ftp_lightning import Schedule, ScheduleFamily, StaticRouter, TokenPruner, UserError
from ftp_lightning.__main__ import parse
from ftp_lightning.models import load_model
from ftp_lightning.routing import DynamicRouter
from ftp_lightning.stages.benchmark import pruners
from ftp_lightning.stages.inputs import chosen_pruner

TINY = ["--model", "random:tiny", "--device", "cpu", "--tracking", "none", "--prompt_tokens", "96"]
SEARCH = [*TINY, *"--windows 2 --stage_windows 1 --generations 0 --offspring 1 --batch_size 1".split()]
MIXED = ("evict", "evict", "keep")


def test_the_mode_is_part_of_the_value():
    plain, keep, evict = (Schedule([0.0, 0.5, 1.0], kv) for kv in (None, "keep", "evict"))
    assert plain.kv is None and keep.kv == ("keep",) * 3
    assert keep == Schedule([0.0, 0.5, 1.0], ["keep"] * 3) and hash(keep) == hash(plain.under("keep"))
    assert len({plain, keep, evict}) == len({one.key() for one in (plain, keep, evict)}) == 3
    assert keep.under(None) == plain and keep.under(MIXED).kv == MIXED


@pytest.mark.parametrize(("kv", "reason"), [("kept", "kept"), (["keep"], "1 blocks"), ([], "0 blocks")])
def test_a_mode_that_is_none_is_refused(kv, reason):
    with pytest.raises(ValueError, match=reason):
        Schedule([0.1, 0.2], kv)


@pytest.mark.parametrize("kv", [None, "keep", "evict", MIXED])
def test_the_mode_is_saved_with_the_schedule(tmp_path, kv):
    schedule = Schedule([0.0, 0.25, 1.0], kv)
    schedule.save(tmp_path / "one.json")
    assert Schedule.load(tmp_path / "one.json") == schedule
    family = ScheduleFamily([schedule, Schedule([0.0, 0.5, 1.0], kv)])
    family.save(tmp_path / "many.json")
    assert ScheduleFamily.load(tmp_path / "many.json") == family
    assert {family.at(budget).kv for budget in (0.0, 0.1, 0.45, 0.5)} == {schedule.kv}


def test_a_file_without_a_mode_still_loads(tmp_path):
    record = {"format": "ftp-lightning/schedule", "version": 1, "sparsity": [0, 0.25, 1], "key": "b30154a6a577e5b6"}
    (tmp_path / "old.json").write_text(json.dumps(record))
    assert Schedule.load(tmp_path / "old.json") == Schedule([0, 0.25, 1])
    (tmp_path / "changed.json").write_text(json.dumps(record | {"kv": "keep"}))
    with pytest.raises(UserError, match="not those it was written with"):
        Schedule.load(tmp_path / "changed.json")


def test_a_family_says_all_its_modes_or_none():
    with pytest.raises(ValueError, match="kv modes"):
        ScheduleFamily([Schedule([0.1], "keep"), Schedule([0.2])])


def test_between_two_schedules_the_nearer_one_says_the_mode(tmp_path):
    low, high = Schedule([0.0, 0.2, 0.4], ["keep", "keep", "evict"]), Schedule([0.4, 0.6, 0.8], ["evict"] * 3)
    family = ScheduleFamily([low, high])
    assert family.at(low.budget) == low and family.at(high.budget) == high
    assert family.at(0.3).kv == ("evict", "keep", "evict")  # only the far one prunes the first block
    assert family.at(0.5).kv == ("evict",) * 3
    assert family.at(0.1).kv == low.kv
    family.save(tmp_path / "f.json")
    assert ScheduleFamily.load(tmp_path / "f.json") == family


def test_a_pruner_takes_the_mode_of_its_schedule():
    router = StaticRouter()
    assert TokenPruner(router, Schedule([0.1] * 3)).kv == ("evict",) * 3
    assert TokenPruner(router, Schedule([0.1] * 3, MIXED)).kv == MIXED
    assert TokenPruner(router, Schedule([0.1] * 3, MIXED), kv=MIXED).kv == MIXED
    with pytest.raises(UserError, match="found for kv keep") as told:
        TokenPruner(router, Schedule([0.1] * 3, "keep"), kv="evict")
    assert str(told.value).count("\n") <= 2


def test_a_changed_pruner_has_one_mode():
    keep, evict = Schedule([0.1] * 3, "keep"), Schedule([0.3] * 3, "evict")
    pruner = TokenPruner(StaticRouter(), keep)
    assert pruner.changed(decode="strict").kv == pruner.kv
    assert pruner.changed(schedule=evict).kv == pruner.with_schedule(evict).kv == ("evict",) * 3
    assert pruner.changed(schedule=evict.under(None)).kv == ("keep",) * 3
    assert pruner.changed(kv="evict").schedule == keep.under("evict")


@pytest.mark.parametrize("kv", [None, MIXED])
def test_a_stored_pruner_has_the_same_mode(tmp_path, kv):
    pruner = TokenPruner(DynamicRouter(), Schedule([0.1] * 3, kv))
    pruner.save(tmp_path / "pruned", base="tiny")
    loaded = TokenPruner.load(tmp_path / "pruned")
    assert (loaded.kv, loaded.schedule) == (pruner.kv, pruner.schedule)


@pytest.mark.parametrize("kv", ["keep", "evict"])
def test_a_searched_schedule_is_used_in_the_mode_it_was_found_for(command, kv):
    status, _, err = command("search", *SEARCH, "--budget", "0.4", "--kv", kv, "--output", "out")
    assert status == 0, err
    found = Schedule.load("out/schedule.json")
    assert TokenPruner(StaticRouter(), found).kv == found.kv == (kv,) * 3
    model = load_model("random:tiny")
    for stage in ("evaluate", "benchmark", "generate"):
        assert chosen_pruner(parse(stage, [*TINY[:2], "--schedule", "out/schedule.json"]), model).kv == found.kv
        same = parse(stage, [*TINY[:2], "--schedule", "out/schedule.json", "--kv", kv])
        assert chosen_pruner(same, model).kv == found.kv
    train = "--steps 1 --batch_size 1 --validations 1 --validation_windows 2 --continuation_tokens 8".split()
    status, _, err = command("train", *TINY, *train, "--schedule", "out/schedule.json", "--output", "trained")
    assert status == 0, err
    trained = TokenPruner.load("trained/pruned")
    assert (trained.kv, trained.schedule) == (found.kv, found)
    status, _, err = command("search", *SEARCH, "--budget", "0.4", "--pruned", "trained/pruned", "--output", "tuned")
    assert status == 0, err
    assert TokenPruner.load("tuned/pruned").kv == Schedule.load("tuned/schedule.json").kv == found.kv


def test_a_searched_family_says_its_mode(command):
    status, _, err = command("search", *SEARCH, "--budgets", "0.2,0.4", "--kv", "evict", "--output", "out")
    assert status == 0, err
    assert ScheduleFamily.load("out/schedules.json").at(0.3).kv == ("evict",) * 3


@given(st.integers(1, 90), st.floats(0.0, 1.0), st.sampled_from([None, "keep", "evict"]))
def test_the_default_meets_its_budget(num_blocks, budget, kv):
    schedule = Schedule.default(num_blocks, budget, kv)
    assert abs(schedule.budget - budget) <= 1e-9 and schedule.num_blocks == num_blocks
    assert schedule.kv[-1] == (kv or "keep") and (kv is None or set(schedule.kv) == {kv})


@pytest.mark.parametrize("num_blocks", [12, 18, 30, 32, 80])
@pytest.mark.parametrize("kv", [None, "keep", "evict"])
def test_the_default_leaves_early_blocks_dense(num_blocks, kv):
    for budget in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        schedule = Schedule.default(num_blocks, budget, kv)
        assert not any(schedule.sparsity[: round(num_blocks / 6)])
        higher = Schedule.default(num_blocks, budget + 0.05, kv)
        assert all(a <= b + 1e-12 for a, b in zip(schedule.sparsity, higher.sparsity))


def test_the_default_of_given_modes_spends_in_keeping_blocks_first():
    own = Schedule.default(12, 0.4)
    assert Schedule.default(12, 0.4, own.kv) == own
    for kv in ("keep", "evict"):
        assert Schedule.default(12, 0.4, [kv] * 12) == Schedule.default(12, 0.4, kv)
    early = Schedule.default(4, 0.2, ["evict", "keep", "evict", "evict"])
    assert early.sparsity == pytest.approx((0, 0.8, 0, 0))
    with pytest.raises(ValueError, match="2 blocks"):
        Schedule.default(3, 0.2, ["keep", "evict"])


@pytest.mark.parametrize("stage", ["evaluate", "benchmark", "generate", "train", "search", "sensitivity", "run"])
def test_the_flag_takes_a_mode_for_all_blocks_or_one_per_block(stage, tmp_path):
    assert parse(stage, TINY[:2]).kv == ("keep" if stage in ("sensitivity", "run") else "auto")
    (tmp_path / "list.yaml").write_text("kv: [evict, evict, keep]\n")
    words = (["--kv", "evict,evict,keep"], ["--kv=[evict, evict, keep]"], ["--config", str(tmp_path / "list.yaml")])
    for given_as in words:
        settings = parse(stage, [*TINY[:2], *given_as])
        assert settings.kv == "evict,evict,keep"
        assert parse(stage, shlex.split(settings.command())[2:]) == settings
    assert parse(stage, [*TINY[:2], "--kv", "evict"]).kv == "evict"


@pytest.mark.parametrize("stage", ["evaluate", "benchmark", "generate", "train", "search", "sensitivity", "run"])
def test_a_flag_that_fits_no_model_or_names_no_mode_is_told(command, tmp_path, stage):
    refused(command(stage, *TINY, "--kv", "evict,keep", "--output", "out"), "kv lists 2 blocks, the model has 3")
    refused(command(stage, *TINY, "--kv", "evict,keep,kept", "--output", "out"), "kv is 'kept'", "evict, keep")
    refused(command(stage, *TINY, "--kv", "keep,auto,keep", "--output", "out"), "kv is 'auto'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["evaluate", "benchmark", "generate", "train", "search"])
def test_another_mode_than_the_schedules_is_told_and_leaves_nothing(command, tmp_path, stage):
    mixed = Schedule([0.0, 0.4, 0.8], MIXED)
    mixed.save("schedule.json")
    TokenPruner(DynamicRouter(), mixed).save("pruned")
    given_as = ["--pruned", "pruned"] if stage == "search" else ["--schedule", "schedule.json"]
    answer = command(stage, *TINY, *given_as, "--kv", "keep", "--output", "out")
    refused(answer, "found for kv evict, evict, keep, and kv is keep")
    if stage in ("evaluate", "benchmark", "generate"):
        answer = command(stage, *TINY, "--pruned", "pruned", "--kv", "keep,keep,evict", "--output", "out")
        refused(answer, "found for kv evict, evict, keep, and kv is keep, keep, evict")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned", "schedule.json"]


def test_a_list_of_modes_reaches_the_pruner(command):
    model = load_model("random:tiny")
    Schedule([0.0, 0.4, 0.8]).save("plain.json")
    for more in ([], ["--schedule", "plain.json"]):
        for stage in ("generate", "evaluate", "benchmark"):
            pruner = chosen_pruner(parse(stage, [*TINY[:2], *more, "--kv", ",".join(MIXED)]), model)
            assert pruner.kv == pruner.schedule.kv == MIXED
    train = "--steps 1 --batch_size 1 --validations 1 --validation_windows 2 --continuation_tokens 8".split()
    status, _, err = command("train", *TINY, *train, "--budget", "0.4", "--kv", ",".join(MIXED), "--output", "trained")
    assert status == 0, err
    assert TokenPruner.load("trained/pruned").schedule == Schedule.default(3, 0.4, MIXED)
    status, _, err = command("search", *SEARCH, "--budget", "0.4", "--kv", ",".join(MIXED), "--output", "out")
    assert status == 0, err
    assert Schedule.load("out/schedule.json").kv == MIXED


def test_a_benchmark_of_modes_times_a_schedule_in_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load_model("random:tiny")
    Schedule([0.0, 0.4, 0.8], MIXED).save("schedule.json")
    for more in (["--schedule", "schedule.json"], ["--budget", "0.4"]):
        found = pruners(parse("benchmark", [*TINY[:2], *more, "--modes", "evict,keep"]), model)
        assert [one.kv for one in found] == [("evict",) * 3, ("keep",) * 3]


def test_flags_that_say_nothing_give_the_default():
    model = load_model("random:tiny")
    for stage in ("generate", "evaluate", "benchmark"):
        pruner = chosen_pruner(parse(stage, [*TINY[:2], "--budget", "0.4"]), model)
        assert pruner.schedule == Schedule.default(3, 0.4) and pruner.kv == pruner.schedule.kv
        for kv in ("keep", "evict"):
            pruner = chosen_pruner(parse(stage, [*TINY[:2], "--budget", "0.4", "--kv", kv]), model)
            assert pruner.schedule == Schedule.default(3, 0.4, kv)


def test_a_mode_per_block_computes_what_it_says():
    """A late block that skips everything under keep leaves the continuation as it is; under evict it does not."""
    model = load_model("random:tiny")
    prompt, more = torch.arange(5, 37)[None], torch.arange(40, 44)[None]

    def logits(kv):
        schedule = Schedule([0.0, 0.0, 1.0], kv)
        with TokenPruner(StaticRouter(), schedule)(model):
            cache = model(prompt).past_key_values
            return model(more, past_key_values=cache).logits

    dense = model(more, past_key_values=model(prompt).past_key_values).logits
    assert torch.allclose(logits(MIXED), dense, atol=1e-5)
    assert not torch.allclose(logits("evict"), dense, atol=1e-3)


def test_the_sensitivity_of_a_mode_per_block_is_that_of_each_blocks_own(command):
    sizes = "--windows 1 --recall_share 0 --levels 0.5 --no_gradient --continuation_tokens 8".split()
    for kv, output in (("both", "both"), (",".join(MIXED), "mixed")):
        status, _, err = command("sensitivity", *TINY, *sizes, "--kv", kv, "--output", output)
        assert status == 0, err
    both, mixed = (json.loads(Path(output, "sensitivity.json").read_text()) for output in ("both", "mixed"))
    assert list(mixed["kl_by_kv"]) == ["mixed"]
    assert mixed["kl"] == [both["kl_by_kv"][mode][block] for block, mode in enumerate(MIXED)]
