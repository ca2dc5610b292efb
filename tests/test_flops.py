"""The cost model against torch's own counter, and against worked numbers."""

import pytest
import torch
from test_engine import BLOCKS, tiny_llama
from torch.utils.flop_counter import FlopCounterMode

from ftp_lightning import Schedule, StaticRouter, TokenPruner
from ftp_lightning.pruning import flops

SCHEDULE = Schedule([0.0, 0.3, 0.6, 0.4])


def counted(model, pruner, tokens):
    """FLOPs of the linear maps of one prefill, as torch counts them; attention is left out (it counts masked pairs
    too)."""
    ids = torch.randint(3, 64, (1, tokens))
    with torch.no_grad(), pruner(model), FlopCounterMode(display=False) as counter:
        model(ids, logits_to_keep=1)
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("schedule", [Schedule.uniform(BLOCKS, 0.0), SCHEDULE])
def test_linear_flops_are_those_executed(kv, schedule):
    model = tiny_llama(torch.float32)
    costs = [flops.BlockCost(c.keys_values, c.other, 0.0, c.cached_bytes) for c in flops.block_costs(model)]
    expected = flops.prompt_flops(costs, schedule, 200, kv, head=2.0 * 32 * 64)
    assert counted(model, TokenPruner(StaticRouter(), schedule, kv=kv), 200) == pytest.approx(expected, rel=0.01)


def test_causal_pairs():
    assert flops.causal_pairs(5, 5) == 15 and flops.causal_pairs(0, 5) == 0
    assert flops.causal_pairs(1, 6) == 6  # one query spread over six keys stands at the end


def test_limits_order_and_bytes():
    model = tiny_llama(torch.float32)
    evict, keep = (flops.speedup_limit(model, SCHEDULE, 100, kv) for kv in ("evict", "keep"))
    assert evict > keep > 1 and flops.speedup_limit(model, Schedule.uniform(BLOCKS, 0.0), 100, "keep") == 1
    assert flops.flops_reduction(model, SCHEDULE, 100, "evict") == pytest.approx(1 - 1 / evict)
    pruner = TokenPruner(StaticRouter(), SCHEDULE, kv="evict")
    with torch.no_grad(), pruner(model):
        cache = model(torch.randint(3, 64, (1, 100)), use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 4
    assert held == flops.cached_bytes(model, SCHEDULE, 100, "evict")
    assert flops.cached_bytes(model, SCHEDULE, 100, "keep") == flops.cached_bytes(
        model, Schedule.uniform(BLOCKS, 0.0), 100, "evict"
    )


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_realised_limit_counts_the_pairs_one_by_one(kv):
    """Against explicit loops over rows, blocks and tokens, with padding."""
    model = tiny_llama(torch.float32)
    real = torch.ones(2, 12, dtype=torch.long)
    real[1, :5] = 0
    pruner = TokenPruner(StaticRouter(), SCHEDULE, kv=kv)
    with torch.no_grad(), pruner(model):
        model(torch.randint(3, 64, (2, 12)), attention_mask=real, use_cache=False)
    costs = flops.block_costs(model)
    dense = pruned = 2 * 2.0 * 32 * 64
    for row in range(2):
        n = int(real[row].sum())
        for cost, keep in zip(costs, pruner.trace.keep):
            kept = [p for p, k in enumerate(keep[row, real[row].bool()]) if k]
            seen = [p + 1 if kv == "keep" else i + 1 for i, p in enumerate(kept)]
            dense += n * (cost.keys_values + cost.other) + n * (n + 1) / 2 * cost.pair
            pruned += (
                (n if kv == "keep" else len(kept)) * cost.keys_values + len(kept) * cost.other + sum(seen) * cost.pair
            )
    assert flops.realised_speedup_limit(model, pruner.trace, kv) == pytest.approx(dense / pruned, rel=1e-9)


def test_realised_and_planned_limits_agree_under_evict():
    model = tiny_llama(torch.float32)
    pruner = TokenPruner(StaticRouter(), SCHEDULE, kv="evict")
    with torch.no_grad(), pruner(model):
        model(torch.randint(3, 64, (1, 50)), use_cache=False)
    planned = flops.speedup_limit(model, SCHEDULE, 50, "evict")
    assert flops.realised_speedup_limit(model, pruner.trace, "evict") == pytest.approx(planned, rel=1e-9)
