"""Prompts that are too short to gain anything are computed densely, and the trace says so."""

import pytest
import torch
from test_engine import tiny_llama

from ftp_lightning import FixedRouter, RandomRouter, Schedule, StaticRouter, TokenPruner
from ftp_lightning.costs.flops import prompt_flops
from ftp_lightning.costs.least_tokens import MARGIN, OVERHEAD, least_tokens
from ftp_lightning.costs.per_block import block_costs

SCHEDULE = Schedule([0.0, 0.5, 0.5, 0.5])
IDS = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("decode", ["dense", "strict"])
@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_a_short_prompt_is_computed_as_the_stock_model_computes_it(kv, decode):
    model = tiny_llama()
    pruner = TokenPruner(RandomRouter(1), SCHEDULE, kv=kv, decode=decode, least_tokens=20)
    with torch.no_grad():
        stock = model(IDS[:, :19], use_cache=True)
        with pruner(model):
            short = model(IDS[:, :19], use_cache=True)
            assert pruner.trace.too_short and pruner.trace.sparsity == [0.0] * 4
            assert torch.equal(short.logits, stock.logits)
            model(IDS[:, :1], past_key_values=short.past_key_values)
            long = model(IDS, use_cache=True)
            assert not pruner.trace.too_short and pruner.trace.sparsity[1] == 0.5
            with pruner.prompt():  # what follows a routed prompt is routed, however short
                model(IDS[:, :6], past_key_values=long.past_key_values)
            assert not pruner.trace.too_short and pruner.trace.sparsity[1] == 0.5
        if decode == "dense":
            again = model(IDS[:, 1:2], past_key_values=stock.past_key_values).logits
            with pruner(model):
                short = model(IDS[:, :19], use_cache=True)
            assert torch.equal(model(IDS[:, 1:2], past_key_values=short.past_key_values).logits, again)


def test_the_longest_row_counts():
    model, mask = tiny_llama(), torch.ones_like(IDS)
    mask[:, :4] = 0
    pruner = TokenPruner(StaticRouter(), SCHEDULE, least_tokens=17)
    with torch.no_grad(), pruner(model):
        model(IDS, attention_mask=mask)
        assert pruner.trace.too_short
        mask[1, :4] = 1
        model(IDS, attention_mask=mask)
        assert not pruner.trace.too_short


@pytest.mark.parametrize("kv", ["evict", "keep", ["keep", "evict", "keep", "evict"]])
def test_auto_is_where_the_saved_flops_are_worth_the_overhead(kv):
    model = tiny_llama()
    found, costs = least_tokens(model, SCHEDULE, kv), block_costs(model)

    def saved(tokens):
        whole = prompt_flops(costs, Schedule.uniform(4, 0.0), tokens, kv)
        return whole - prompt_flops(costs, SCHEDULE, tokens, kv)

    wanted = MARGIN * 3 * OVERHEAD["cpu"]
    assert saved(found) >= wanted > saved(found - 1)
    assert least_tokens(model, Schedule.uniform(4, 0.0), "evict") == 0
    pruner = TokenPruner(StaticRouter(), SCHEDULE, kv=kv, least_tokens="auto")
    with torch.no_grad(), pruner(model):
        model(IDS)
    assert found > 20 and pruner.trace.too_short


def test_it_is_stored_and_carried_along(tmp_path):
    pruner = TokenPruner(StaticRouter(), SCHEDULE, least_tokens="auto")
    pruner.save(tmp_path / "p", model=tiny_llama())
    assert TokenPruner.load(tmp_path / "p").least_tokens == "auto"
    assert (
        pruner.changed(kv="keep").least_tokens == "auto"
        and "least_tokens" not in pruner.changed(least_tokens=0).settings()
    )


@pytest.mark.parametrize("wrong", [-1, 2.5, "few", True])
def test_another_value_is_refused(wrong):
    with pytest.raises(ValueError, match="least_tokens"):
        TokenPruner(StaticRouter(), SCHEDULE, least_tokens=wrong)


def test_a_fixed_router_without_a_schedule_obeys_its_list():
    model, keep = tiny_llama(), [torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) < 0.5] * 4
    pruner = TokenPruner(FixedRouter(keep), None, least_tokens="auto")
    with torch.no_grad(), pruner(model):
        model(IDS)
    assert torch.equal(pruner.trace.keep[2], keep[2])
