"""Gradients through the keys that `evict` hides: the derivative of an obvious attention with gates on its keys."""

import pytest
import torch
from test_engine import seeded, tiny_llama
from test_router_training import windows

from ftp_lightning import DynamicRouter, Schedule, TokenPruner
from ftp_lightning.pruning import key_gates
from ftp_lightning.pruning.attention import Sight
from ftp_lightning.pruning.gates import StraightThrough
from ftp_lightning.pruning.key_gates import gated_keys
from ftp_lightning.pruning.tokens import Tokens

B, H, G, T, D = 2, 4, 2, 11, 8


def slow(query, key, value, gate, window, real):
    """out_i = sum_j g_j e^s v / sum_j g_j e^s over j <= i within the window, query by query; its own g_i is 1."""
    key, value = (x.repeat_interleave(H // G, dim=1) for x in (key, value))
    rows = []
    for i in range(T):
        low = 0 if window is None else max(0, i - window + 1)
        own = torch.cat([gate[:, low:i] * real[:, low:i], torch.ones(B, 1, dtype=gate.dtype)], 1)
        logits = torch.einsum("bhd,bhsd->bhs", query[:, :, i], key[:, :, low : i + 1]) * D**-0.5
        weights = own[:, None] * logits.exp()
        rows.append(torch.einsum("bhs,bhsd->bhd", weights / weights.sum(-1, keepdim=True), value[:, :, low : i + 1]))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("chunk", [3, 128])
def test_the_gradient_is_that_of_gates_on_keys(window, chunk, monkeypatch):
    monkeypatch.setattr(key_gates, "CHUNK", chunk)
    torch.manual_seed(0)
    query, key, value = (torch.randn(B, n, T, D, dtype=torch.float64) for n in (H, G, G))
    real = torch.ones(B, T, dtype=torch.bool)
    real[1, :2] = False
    hard = (torch.rand(B, T) > 0.4) & real
    gate = hard.to(torch.float64).requires_grad_()
    out = slow(query, key, value, gate, window, real)
    upstream = torch.randn_like(out)
    upstream[1, :2] = 0
    wanted = torch.autograd.grad(out, gate, upstream)[0]
    slots = torch.arange(T).expand(B, T)
    sight = Sight(Tokens(slots, real, False), Tokens(slots, hard, False), window, T, themselves=True, real=real)
    given = gated_keys(out.detach(), gate, query, key, value, sight, D**-0.5)
    assert torch.equal(given, out)
    found = torch.autograd.grad(given, gate, upstream)[0]
    assert torch.allclose(found[real], wanted[real], rtol=1e-5, atol=1e-6)  # shares are computed in float32
    assert not found[~real].any()


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
