"""Gradients through the keys that `evict` hides: what attention says with a key less what it says without."""

import pytest
import torch
from test_engine import seeded, tiny_llama
from test_router_training import windows

from ftp_lightning import DynamicRouter, Schedule, TokenPruner
from ftp_lightning.pruning.attention import Sight
from ftp_lightning.pruning.kept import Tokens
from ftp_lightning.training import key_gates
from ftp_lightning.training.gates import StraightThrough
from ftp_lightning.training.key_gates import gated_keys

B, H, G, T, D = 2, 4, 2, 11, 8


def slow(query, key, value, hard, window, real):
    """out (B, T, H, D) over the keys j <= i within the window that `hard` (B, T) keeps, and each query's own; query by
    query."""
    key, value = (x.repeat_interleave(H // G, dim=1) for x in (key, value))
    rows = []
    for i in range(T):
        low = 0 if window is None else max(0, i - window + 1)
        seen = torch.cat([hard[:, low:i] & real[:, low:i], torch.ones(B, 1, dtype=torch.bool)], 1)
        logits = torch.einsum("bhd,bhsd->bhs", query[:, :, i], key[:, :, low : i + 1]) * D**-0.5
        weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        rows.append(torch.einsum("bhs,bhsd->bhd", weights, value[:, :, low : i + 1]))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("chunk", [3, 128])
def test_a_gate_counts_by_what_its_decision_changes(window, chunk, monkeypatch):
    monkeypatch.setattr(key_gates, "CHUNK", chunk)
    monkeypatch.setattr(key_gates, "MOST", 1e9)
    torch.manual_seed(0)
    query, key, value = (torch.randn(B, n, T, D, dtype=torch.float64) for n in (H, G, G))
    real = torch.ones(B, T, dtype=torch.bool)
    real[1, :2] = False
    hard = (torch.rand(B, T) > 0.4) & real
    out, upstream = slow(query, key, value, hard, window, real), torch.randn(B, T, H, D, dtype=torch.float64)
    upstream[1, :2] = 0
    slots = torch.arange(T).expand(B, T)
    sight = Sight(Tokens(slots, real, False), Tokens(slots, hard, False), window, T, themselves=True, real=real)
    gate = hard.to(torch.float64).requires_grad_()
    given = gated_keys(out, gate, query, key, value, sight, D**-0.5)
    assert torch.equal(given, out)
    found = torch.autograd.grad(given, gate, upstream)[0]
    for j in range(T):
        on, off = hard.clone(), hard.clone()
        on[:, j], off[:, j] = real[:, j], False
        change = slow(query, key, value, on, window, real) - slow(query, key, value, off, window, real)
        wanted = (change * upstream).sum((1, 2, 3))
        assert torch.allclose(found[:, j], wanted, rtol=1e-4, atol=1e-5)  # shares are computed in float32


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("recompute", [False, True])
def test_values_stay_and_gradients_come_under_evict_alone(kv, recompute):
    model, router, rows = tiny_llama(torch.float64), seeded(DynamicRouter), windows(2).input_ids
    pruner, found = TokenPruner(router, Schedule([0.0, 0.5, 0.5, 0.5]), kv=kv), []
    for keys in (False, True):
        with pruner(model), pruner.masked(18, StraightThrough(keys=keys), recompute):
            hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state[:, 17:]
        found.append(
            (hidden, torch.cat([g.flatten() for g in torch.autograd.grad(hidden.pow(2).sum(), router.parameters())]))
        )
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1]) == (kv == "keep")


def test_a_hidden_key_gets_a_gradient_where_nothing_else_gives_one():
    """Under `evict` a token that skips all later blocks is read by nobody; its gate learns nothing but by its key."""
    model, router, rows = tiny_llama(torch.float64), seeded(DynamicRouter), windows(2).input_ids
    pruner, shares = TokenPruner(router, Schedule([0.0, 0.0, 0.0, 0.5]), kv="evict"), []
    for keys in (False, True):
        with pruner(model), pruner.masked(18, StraightThrough(keys=keys)):
            hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state[:, 18:]
        probability = pruner.decisions[0].probability
        gradient = torch.autograd.grad(hidden.pow(2).sum(), probability, allow_unused=True)[0]
        shares.append(0.0 if gradient is None else (gradient[:, 1:17] != 0).float().mean().item())
    assert shares[0] == 0.0 and shares[1] > 0.9
