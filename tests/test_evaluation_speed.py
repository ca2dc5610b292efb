"""The stopwatch: what it runs, in which order, and what it reports beside the time."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ftp_lightning.errors import UserError
from ftp_lightning.evaluation import speed
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.flops import realised_speedup_limit
from ftp_lightning.routing.static import StaticRouter
from ftp_lightning.schedule import Schedule


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def pruner():
    return TokenPruner(StaticRouter(), Schedule([0.0, 0.5, 0.75]))


def generator():
    return torch.Generator().manual_seed(0)


def test_pairs_are_measured_in_turn_and_warm_up_is_left_out(model, pruner, monkeypatch):
    clock = {"dense": 9.0, "pruned": 9.0}
    order = []

    def seconds(model, ids):
        kind = "pruned" if pruner._engine is not None else "dense"
        order.append((kind, tuple(ids.shape)))
        model(ids)
        if len(order) > 4:  # after 2 warm-up pairs
            clock.update(dense=0.030, pruned=0.020)
        return clock[kind]

    monkeypatch.setattr(speed, "_seconds", seconds)
    result = speed.prefill_speed(model, pruner, 40, batch=2, pairs=4, warmup=2, generator=generator())
    assert [kind for kind, _ in order] == ["dense", "pruned", "pruned", "dense"] * 3
    assert {shape for _, shape in order} == {(2, 40)}
    assert (result.dense_ms, result.pruned_ms) == (30.0, 20.0)
    assert result.ratio == result.ratio_low == result.ratio_high == pytest.approx(1.5)
    assert result.sparsity == pytest.approx((0 + 20 + 30) / 120)
    assert result.flops_limit == realised_speedup_limit(model, pruner.trace.prompt, pruner.kv)


def test_real_times_are_positive_and_the_interval_holds_the_median(model, pruner):
    result = speed.prefill_speed(model, pruner, 32, pairs=5, warmup=1, generator=generator())
    assert result.dense_ms > 0 and result.pruned_ms > 0
    assert result.ratio_low <= result.ratio <= result.ratio_high


def test_median_interval_narrows_with_the_spread():
    wide = speed._median_interval(torch.linspace(0, 2, 101, dtype=torch.float64), generator())
    narrow = speed._median_interval(torch.linspace(0.9, 1.1, 101, dtype=torch.float64), generator())
    assert wide[0] < narrow[0] < 1 < narrow[1] < wide[1]


def test_a_prompt_longer_than_the_positions_is_refused(model, pruner):
    with pytest.raises(UserError, match="length is 65, the model takes 64"):
        speed.prefill_speed(model, pruner, 65, generator=generator())
