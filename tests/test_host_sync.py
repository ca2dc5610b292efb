"""Under `topk` no block asks the device for a value: the whole prefill runs on tensors that have none."""

import contextlib

import pytest
import torch
from families import CONFIGS, family

from ftp_lightning import Schedule, TokenPruner
from ftp_lightning.routing import make_router

SCHEDULE = Schedule([0.0, 0.3, 0.6, 0.4])
ROUTERS = ("static", "random", "dynamic", "local", "recurrent", "hidden", "hidden+factors", "one_pass")


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """torch has no autocast for the meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())


def on_meta(name):
    """On the meta device `.item()`, `bool(tensor)` and boolean indexing are errors."""
    model = family(name, torch.float32).to("meta")
    model.config.pad_token_id = None  # or GPT-2 looks for padding, to warn of it
    return model


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize(("router", "attention"), [("dynamic", "exact"), *((name, "window") for name in ROUTERS)])
def test_no_router_asks_the_device(router, kv, attention):
    model = on_meta("llama")
    pruner = TokenPruner(make_router(router, 4, 32), SCHEDULE, kv=kv, attention=attention)
    with torch.no_grad(), pruner(model):
        first = model(torch.zeros(2, 20, dtype=torch.long, device="meta"), use_cache=True)
        cache = first.past_key_values
        model(torch.zeros(2, 1, dtype=torch.long, device="meta"), past_key_values=cache)
        with pruner.prompt():
            model(torch.zeros(2, 7, dtype=torch.long, device="meta"), past_key_values=cache)
    stored = [20, 14, 8, 12] if kv == "evict" else [20] * 4
    second = [7, 5, 3, 4] if kv == "evict" else [7] * 4
    assert [layer.keys.shape[2] for layer in cache.layers] == [a + 1 + b for a, b in zip(stored, second)]


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"mixtral", "qwen3_moe"}))  # transformers counts experts' tokens
def test_no_family_asks_the_device(name, kv):
    model = on_meta(name)
    for parts in ("block", "attention+mlp"):
        pruner = TokenPruner(make_router("dynamic", 4, 32), SCHEDULE, kv=kv, parts=parts)
        with torch.no_grad(), pruner(model):
            cache = model(torch.zeros(1, 20, dtype=torch.long, device="meta"), use_cache=True).past_key_values
            model(torch.zeros(1, 1, dtype=torch.long, device="meta"), past_key_values=cache)


def test_the_guard_guards():
    """A threshold has to ask how many tokens passed it, and the meta device says so."""
    model = on_meta("llama")
    pruner = TokenPruner(make_router("dynamic", 4, 32), SCHEDULE, choice="threshold")
    with pytest.raises(RuntimeError), torch.no_grad(), pruner(model):
        model(torch.zeros(1, 20, dtype=torch.long, device="meta"))
