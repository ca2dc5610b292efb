"""A budget told as a share of FLOPs: what the stages make of it, and what they refuse."""

import json

import pytest
from test_cli import refused

from ftp_lightning import Schedule
from ftp_lightning.__main__ import parse
from ftp_lightning.costs.budget import solve_budget
from ftp_lightning.costs.flops import flops_reduction
from ftp_lightning.models import load_model
from ftp_lightning.stages.inputs import chosen_pruner, token_budget

TINY = ["--model", "random:tiny"]
FLOPS = ["--budget_kind", "flops", "--budget", "0.3"]
SEARCH = "--windows 2 --stage_windows 1 --generations 1 --offspring 1 --survivors 1 --parents 1 --tracking none".split()


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("stage", ["benchmark", "evaluate", "generate"])
def test_a_plain_budget_is_solved_for(stage, kv):
    settings = parse(stage, [*TINY, *FLOPS, "--budget_length", "512", "--kv", kv])
    model = load_model(settings.model)
    pruner = chosen_pruner(settings, model)
    assert pruner.schedule == Schedule.default(3, pruner.schedule.budget, kv) and pruner.schedule.kv == (kv,) * 3
    assert flops_reduction(model, pruner.schedule, 512, kv) == pytest.approx(0.3, abs=2 / 512)


def test_tokens_are_the_default_and_taken_as_they_are():
    settings = parse("benchmark", [*TINY, "--budget", "0.3"])
    model = load_model(settings.model)
    assert chosen_pruner(settings, model).schedule == Schedule.default(3, 0.3)
    assert token_budget(parse("benchmark", TINY), model, "keep") is None


def test_the_search_gets_the_tokens_of_the_uniform_schedule(command):
    status, *_ = command("search", *TINY, *FLOPS, *SEARCH, "--kv", "evict", "--output", "out")
    assert status == 0
    with open("out/metrics.json", encoding="utf-8") as file:
        metrics = json.load(file)
    found, model = Schedule.load("out/schedule.json"), load_model("random:tiny")
    assert found.budget == pytest.approx(solve_budget(model, 0.3, 1024, "evict").budget, abs=1e-9)
    assert metrics["flops_reduction"] == pytest.approx(flops_reduction(model, found, 1024, "evict"))


def test_a_run_hands_the_kind_on_to_both_searches():
    settings = parse("run", [*TINY, *FLOPS, "--budget_length", "600", "--kv", "evict"])
    model, stages = load_model(settings.model), settings.stages()
    for name in ("search", "finetune"):
        stage = stages[name]
        assert (stage.budget, stage.budget_kind, stage.budget_length) == (0.3, "flops", 600)
        tokens = stage.in_tokens(token_budget(stage, model, stage.kv))
        assert (tokens.budget_kind, tokens.budget) == ("tokens", solve_budget(model, 0.3, 600, "evict").sparsity[0])


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["benchmark", "--budget_kind", "flops"], ["needs a budget"]),
        (["evaluate", "--budget_kind", "flops", "--schedule", "s.json"], ["needs a budget"]),
        (["search", "--budget_length", "512"], ["budget of tokens", "--budget_kind flops"]),
        (["run", "--budget_length", "512"], ["budget of tokens"]),
        (["search", "--budget_kind", "time"], ["budget_kind", "time"]),
        (["search", *FLOPS, "--budget_length", "2"], ["budget_length is 2"]),
        (["run", *TINY, *FLOPS, "--budget_length", "5000"], ["prompts of the budget", "5000", "4096"]),
        (["generate", *TINY, *FLOPS, "--budget_length", "5000"], ["prompts of the budget", "5000", "4096"]),
        (["search", *TINY, "--budget_kind", "flops", "--budget", "0.99"], ["0.99 cannot be reached", "at most"]),
        (
            ["search", *TINY, *FLOPS, "--prompt_tokens", "4", "--kv", "keep", "--budget", "0.7"],
            ["cannot be reached with prompts of 4 tokens"],
        ),
        (
            ["benchmark", *TINY, *FLOPS, "--lengths", "4", "--kv", "keep", "--budget", "0.7"],
            ["cannot be reached with prompts of 4 tokens"],
        ),
    ],
)
def test_what_does_not_go_together_is_told(command, arguments, fragments):
    refused(command(*arguments), *fragments)
