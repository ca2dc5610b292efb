"""The router for those who train nothing, the command that gives it, and routers used on another model."""

import json

import pytest
import torch
from test_cli import refused
from test_engine import BLOCKS, MODEL, TEXT, prefill_and_continue, relative, run_row, seeded, tiny_llama
from test_routing import context
from transformers import LlamaConfig, LlamaForCausalLM

from ftp_lightning import DynamicRouter, Schedule, StaticRouter, TokenPruner, UntrainedRouter, UserError, make_router

TINY = ["--model", "random:tiny", "--device", "cpu", "--tracking", "none", "--prompt_tokens", "96"]


def test_it_is_the_mean_of_position_and_rank():
    attention = torch.tensor([[3.0, 0.5, 1.0, 2.0]])
    expected = [(0 + 3) / 6, (1 + 0) / 6, (2 + 1) / 6, (3 + 2) / 6]  # (i + rank) / (2 (T - 1))
    assert UntrainedRouter().score(context(4, attention=attention))[0].tolist() == pytest.approx(expected)
    assert UntrainedRouter().needs.attention and UntrainedRouter().parameter_count == 0


def test_without_attention_it_is_the_static_router():
    schedule, traces = Schedule([0.0, 0.3, 0.6, 0.9]), []
    for router in (UntrainedRouter(("position", "sparsity")), StaticRouter()):
        assert not router.needs.attention
        traces.append(prefill_and_continue(MODEL, TokenPruner(router, schedule), TEXT, 18)[1])
    assert all(torch.equal(a, b) for a, b in zip(*(trace.keep for trace in traces)))


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_gathered_equals_oracle(kv):
    pruner = TokenPruner(UntrainedRouter(), Schedule([0.0, 0.3, 0.6, 0.4]), kv=kv, window=5)
    logits, trace = prefill_and_continue(MODEL, pruner, TEXT, 18)
    for row in range(len(TEXT)):
        expected, keep = run_row(MODEL, pruner, TEXT[row], 18)
        assert all(torch.equal(k[row], e) for k, e in zip(trace.keep, keep))
        assert relative(logits[row], expected) < 1e-11


def test_its_scores_are_no_probabilities():
    with pytest.raises(UserError, match="ranks the tokens"):
        TokenPruner(UntrainedRouter(), Schedule([0.5] * BLOCKS), choice="threshold")
    with pytest.raises(ValueError, match="unknown factors"):
        UntrainedRouter(("position", "taste"))


def test_one_command_gives_a_pruner_that_the_other_stages_take(command):
    search = ["--router", "untrained", "--allocations", "ramp", "--generations", "0", "--windows", "2"]
    status, _, err = command("search", *TINY, *search, "--budget", "0.3", "--output", "none")
    assert status == 0, err
    pruner = TokenPruner.load("none/pruned")
    assert type(pruner.router) is UntrainedRouter and pruner.router.names == ("position", "rank")
    assert pruner.schedule == Schedule([0.0, 0.3, 0.6], "keep") and set(pruner.kv) == {"keep"}
    assert json.loads(open("none/pruned/pruner.json").read())["sparsity"] == [0.0, 0.3, 0.6]
    short = ["--prompt", "The old man walked to the river and looked at it for a while.", "--max_new_tokens", "2"]
    status, _, err = command(
        "generate", *TINY[:6], "--pruned", "none/pruned", *short, "--pairs", "2", "--output", "said"
    )
    assert status == 0, err
    refused(command("train", *TINY, "--pruned", "none/pruned", "--output", "next"), "nothing to train")


def other_llama(hidden, blocks):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=48, num_hidden_layers=blocks, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)


def test_the_papers_router_serves_a_model_of_other_sizes_and_others_say_no(tmp_path):
    other = other_llama(24, 3)
    TokenPruner(seeded(DynamicRouter), Schedule([0.4] * BLOCKS)).save(tmp_path / "own", model=tiny_llama())
    moved = TokenPruner(TokenPruner.load(tmp_path / "own").router, Schedule([0.0, 0.5, 0.4]), kv="keep", window=5)
    logits, _ = prefill_and_continue(other, moved, TEXT, 18)
    expected, _ = run_row(other, moved, TEXT[0], 18)
    assert relative(logits[0], expected) < 1e-11
    for name in ("projected", "hidden", "hidden+factors"):
        with pytest.raises(UserError, match="made for a model with 32 hidden units, this one has 24"):
            TokenPruner(make_router(name, 3, 32), Schedule([0.0, 0.5, 0.4])).attach(other)
    for name in ("local", "one_pass"):
        with pytest.raises(UserError, match="made for a model with 4 blocks, this one has 3"):
            TokenPruner(make_router(name, 4, 24), Schedule([0.0, 0.5, 0.4])).attach(other)
    with pytest.raises(UserError):  # the pruner as a whole belongs to its base model
        TokenPruner.load(tmp_path / "own").attach(tiny_llama(seed=1))
