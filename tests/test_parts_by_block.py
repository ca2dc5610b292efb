"""Decisions that address other parts in other blocks: as the same decisions given part by part."""

import json

import pytest
import torch
from test_engine import MODEL, TEXT, prefill_and_continue

from ftp_lightning import FixedRouter, Schedule, StaticRouter, TokenPruner, UserError, fit_compensation
from ftp_lightning.costs.flops import flops_reduction
from ftp_lightning.costs.request import planned_cut, row_costs
from ftp_lightning.data.rows import Rows

MIXED = ["block", "mlp", "attention+mlp", "block"]
SCHEDULE = Schedule([0.0, 0.4, 0.5, 0.8])


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_mixed_parts_are_the_decisions_given_part_by_part(kv):
    pruner = TokenPruner(StaticRouter(), SCHEDULE, kv=kv, parts=MIXED)
    found, _ = prefill_and_continue(MODEL, pruner, TEXT, 18)
    trace = pruner.trace.prompt
    assert [bool(keep.all()) for keep in trace.keep_attention] == [True, True, False, False]
    assert [bool(keep.all()) for keep in trace.keep_mlp] == [True, False, False, False]
    replay = FixedRouter(keep_attention=trace.keep_attention, keep_mlp=trace.keep_mlp)
    expected, _ = prefill_and_continue(MODEL, TokenPruner(replay, None, kv=kv), TEXT, 18)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_mixed_parts_cost_is_planned_as_it_comes():
    pruner = TokenPruner(StaticRouter(), SCHEDULE, kv="keep", parts=MIXED)
    with torch.no_grad(), pruner(MODEL):
        MODEL(TEXT, use_cache=False)
    planned = planned_cut(MODEL, pruner, TEXT.shape[1])
    assert planned == pytest.approx(row_costs(MODEL, pruner, pruner.trace).cut, abs=0.02)
    assert planned == pytest.approx(flops_reduction(MODEL, SCHEDULE, TEXT.shape[1], "keep", MIXED))
    assert planned < planned_cut(MODEL, pruner.changed(parts="block"), TEXT.shape[1])


def test_mixed_parts_are_stored_and_say_what_they_address(tmp_path):
    rows = Rows.even(torch.randint(3, 64, (4, 24)), 20, ["plain"] * 4, list(range(4)))
    fitted = fit_compensation(MODEL, rows, 3, parts="block+attention+mlp")
    pruner = TokenPruner(StaticRouter(), SCHEDULE, kv="keep", parts=MIXED, skip="low-rank", compensation=fitted)
    assert pruner.addressed == ["block", "attention", "mlp"] and pruner.parts == tuple(MIXED)
    pruner.save(tmp_path / "p")
    again = TokenPruner.load(tmp_path / "p")
    assert json.loads(json.dumps(again.identity())) == json.loads(json.dumps(pruner.identity()))
    assert again.changed(parts="mlp").parts == "mlp"
    (found, _), (same, _) = (prefill_and_continue(MODEL, one, TEXT, 18) for one in (pruner, again))
    assert torch.equal(found, same)


def test_wrong_lists_are_refused():
    for parts, said in ((["block"] * 3, "lists 3 blocks, the schedule 4"), (["block", "mlp", "mlp", "ffn"], "'ffn'")):
        with pytest.raises(UserError, match=said):
            TokenPruner(StaticRouter(), SCHEDULE, parts=parts)
    with pytest.raises(UserError, match="decisions address the mlp"):
        block = fit_compensation(MODEL, Rows.even(torch.randint(3, 64, (2, 24)), 20, ["a"] * 2, [0, 1]), 0)
        TokenPruner(StaticRouter(), SCHEDULE, parts=["block"] * 3 + ["mlp"], skip="mean", compensation=block)
