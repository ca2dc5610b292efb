"""Limits beside a speed-up, and memory: formulas on made-up clocks, and that blocks of every family can be called."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig

from ftp_lightning.costs.flops import block_costs, head_flops, prompt_flops, speedup_limit
from ftp_lightning.evaluation.speed import block_clock, memory
from ftp_lightning.evaluation.speed import prefill as speed
from ftp_lightning.evaluation.speed.block_clock import BlockClock
from ftp_lightning.evaluation.speed.limits import most_kept, most_run, padded_flops_limit, shape_limit
from ftp_lightning.evaluation.speed.prompts import random_prompts
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.family import find_blocks
from ftp_lightning.pruning.trace import Trace
from ftp_lightning.routing import StaticRouter
from ftp_lightning.schedule import Schedule
from tests.tiny import random_llama


@pytest.fixture(scope="module")
def model():
    return random_llama(48, max_position_embeddings=64, num_key_value_heads=2)


def prompts(model, length=32, batch=2, mixed=False):
    return random_prompts(model, length, batch, mixed, generator=torch.Generator().manual_seed(0))


def routed(model, schedule, kv, mixed):
    pruner = TokenPruner(StaticRouter(), schedule, kv=kv)
    with pruner(model):
        speed.prefill(model, prompts(model, mixed=mixed))
    return pruner


class Linear:
    """A clock on which a block takes a millisecond per token, and under `keep` a tenth of it per deposited one."""

    def seconds(self, tokens, kv="evict"):
        return 1e-3 * (tokens if kv == "evict" or tokens == 32 else tokens + 0.1 * (32 - tokens))


def test_shape_limit_is_dense_time_without_what_the_blocks_save(model):
    trace = routed(model, Schedule([0.0, 0.5, 0.75]), "evict", mixed=False).trace.prompt
    assert most_kept(trace) == [32, 16, 8] and most_run(trace) == [32, 16, 1]
    assert shape_limit(Linear(), 100.0, trace, ("evict",) * 3) == pytest.approx(100 / (100 - 96 + 32 + 16 + 1))
    kept = 100 / (100 - 96 + 32 + 16 + 1.6 + 1 + 3.1)
    assert shape_limit(Linear(), 100.0, trace, ("keep",) * 3) == pytest.approx(kept)
    # blocks alone slower than the whole: their times are scaled down to it
    assert shape_limit(Linear(), 48.0, trace, ("evict",) * 3) == pytest.approx(96 / 49)


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_padded_limit_counts_the_fullest_row_and_the_longest(model, kv):
    schedule = Schedule([0.0, 0.5, 0.75])
    mixed = routed(model, schedule, kv, mixed=True)
    assert mixed.trace.prompt.real.sum(1).tolist() == [32, 8] and most_kept(mixed.trace.prompt) == [32, 16, 8]
    limit = padded_flops_limit(model, mixed.trace.prompt, mixed.kv)
    costs, head = block_costs(model), head_flops(model)
    pruned = prompt_flops(costs, schedule, 32, kv, head, last_only=True)
    assert limit == pytest.approx(prompt_flops(costs, Schedule.uniform(3, 0.0), 32, kv, head) / pruned)
    mixed.trace.prompt.last_only = False
    limit = padded_flops_limit(model, mixed.trace.prompt, mixed.kv)
    assert limit == pytest.approx(speedup_limit(model, schedule, 32, kv), rel=1e-12)


def test_a_dense_block_of_a_padded_batch_keeps_its_padding():
    real = torch.tensor([[True] * 4, [False, True, True, True]])[:, :4]
    some = torch.tensor([[True, False, False, True], [False, True, False, True]])
    assert most_kept(Trace(keep=[real, some], real=real)) == [4, 2]


def test_every_length_is_measured_once_and_in_turn_with_the_whole(model, monkeypatch):
    order = []

    def seconds(run, device, clock):
        tokens = run().shape[1]
        order.append(tokens)
        return float(tokens)

    monkeypatch.setattr(block_clock, "seconds", seconds)
    clock = BlockClock(model, prompts(model), repeats=2)
    assert clock.seconds(8) == 8.0 and clock.seconds(32) == 32.0
    assert order == [8, 32, 32, 8] * 2 + [32] * 8
    assert clock.seconds(8) == 8.0 and clock.seconds(32, "keep") == 32.0 and clock.seconds(0) == 0.0
    assert len(order) == 16


def test_keep_adds_attention_to_all_and_the_projections(model, monkeypatch):
    clock = BlockClock(model, prompts(model), repeats=1)
    monkeypatch.setattr(clock, "_evict", lambda tokens: 10.0 * tokens)
    monkeypatch.setattr(clock, "_attention", lambda queries, keys: 1.0 * queries * keys)
    monkeypatch.setattr(clock, "_projections", lambda tokens: 0.5 * tokens)
    assert clock.seconds(8, "keep") == 80 - 64 + 8 * 32 + 0.5 * 24
    assert clock.seconds(0, "keep") == 16.0


CONFIGS = {
    "gpt2": GPT2Config(vocab_size=48, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "opt": OPTConfig(
        vocab_size=48, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("family", ["llama", *CONFIGS])
def test_blocks_of_every_family_are_called_as_their_model_does(model, family, mixed):
    net = model if family == "llama" else AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    text = prompts(net, mixed=mixed)
    clock = BlockClock(net, text, repeats=1)
    seen = []
    handle = find_blocks(net)[1].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        net(**text.arguments, use_cache=False)
        again = clock._call(32)()
    handle.remove()
    first, again = (out[0] if isinstance(out, tuple) else out for out in (seen[0], again))
    assert torch.equal(first, again)
    assert clock.seconds(8) > 0 and clock.seconds(8, "keep") > 0


def test_a_caught_block_leaves_the_model_as_it_was(model):
    text = prompts(model)
    before = model(**text.arguments).logits
    BlockClock(model, text, repeats=1).seconds(8)
    assert torch.equal(before, model(**text.arguments).logits)
    assert not find_blocks(model)[1]._forward_pre_hooks


def test_peak_sees_what_a_call_takes_and_not_what_was_there():
    device = torch.device("cpu")
    if memory.why_no_peak(device):
        pytest.skip(memory.why_no_peak(device))
    held = torch.ones(2**23)  # 32 MiB
    peak = memory.peak_bytes(lambda: torch.ones(2**24).sum(), device)
    assert 0.8 * 2**26 < peak < 1.5 * 2**26 and held.sum() > 0


def test_a_system_that_forbids_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "missing")
    assert "reset its peak memory" in memory.why_no_peak(torch.device("cpu"))
    assert "mps" in memory.why_no_peak(torch.device("mps"))


@pytest.mark.parametrize(("kv", "entries"), [("evict", 32 + 16 + 8), ("keep", 3 * 32)])
def test_cache_bytes_are_those_of_the_entries_held(model, kv, entries):
    pruner = TokenPruner(StaticRouter(), Schedule([0.0, 0.5, 0.75]), kv=kv)
    with pruner(model):
        cache = speed.prefill(model, prompts(model)).past_key_values
    assert memory.cache_bytes(cache) == entries * 2 * 2 * (2 * 8) * 4  # rows, keys and values, heads x size, float32
