"""Under `topk` no block asks the device for a value: the whole prefill runs on tensors that have none."""

import contextlib
from collections import Counter

import pytest
import torch
from families import CONFIGS, family
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"mixtral", "qwen3_moe"}))  # transformers counts experts' tokens
def test_no_family_asks_the_device(name):
    model, kv = on_meta(name), ["keep", "evict", "keep", "evict"]
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


VIEWS = frozenset(
    "alias as_strided detach expand permute reshape select slice split squeeze t transpose unsqueeze view".split()
) | {"_unsafe_view"}


class Launches(TorchDispatchMode):
    """Counts the operations that would be kernels on an accelerator: all but views."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        if name not in VIEWS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def launches(model, pruner=None):
    with torch.no_grad(), pruner(model) if pruner else contextlib.nullcontext(), Launches() as mode:
        model(torch.zeros(1, 40, dtype=torch.long, device="meta"), use_cache=True, logits_to_keep=1)
    return mode.counts


@pytest.mark.parametrize(("kv", "most"), [("evict", 8), ("keep", 30)])
def test_a_run_of_blocks_with_one_kept_set_decides_once(kv, most):
    """docs/benchmarks.md has these counts. A router that ranks once is sorted once, and its tokens are found once."""
    model = on_meta("llama")
    pruner = TokenPruner(make_router("static", 4, 32), Schedule([0.0, 0.4, 0.4, 0.4]), kv=kv)
    dense, first = launches(model), launches(model, pruner.with_schedule(Schedule([0.0, 0.4, 0.0, 0.0])))
    three = launches(model, pruner)
    assert first["sort"] == three["sort"] == 1 and dense["sort"] == 0
    assert (three.total() - first.total()) / 2 <= most, three - dense


def test_other_counts_or_scores_decide_anew():
    model = on_meta("llama")
    for router, levels in (("static", [0.0, 0.4, 0.4, 0.6]), ("random", [0.0, 0.4, 0.4, 0.4])):
        sorts = launches(model, TokenPruner(make_router(router, 4, 32), Schedule(levels)))["sort"]
        assert sorts == (2 if router == "static" else 3)
