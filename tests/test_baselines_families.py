"""The peers' seams in every family, and without asking the device."""

import pytest
import torch
from families import CONFIGS, family
from oracle import masked_dense
from test_baselines import SELECTORS
from test_families import DTYPES, TEXT, finest, relative
from test_host_sync import no_autocast, on_meta  # noqa: F401

from ftp_lightning import Schedule, StaticRouter, TokenPruner
from ftp_lightning.baselines.gem_filter import GemFilterSelector
from ftp_lightning.baselines.spatten import CumulativeSelector

PROMPT = 18
REMOVED = [(0, "block"), (1, "attention"), (2, "mlp")]


def both_ways(name, pruner):
    """Largest relative error of prompt and continuation, gathered through the cache, against the masked oracle."""
    model = family(name, finest(name))
    with torch.no_grad(), pruner(model):
        first = model(TEXT[:1, :PROMPT], use_cache=True)
        cache, logits = first.past_key_values, [first.logits]
        for start, stop in ((PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + 4)):
            logits.append(model(TEXT[:1, start:stop], past_key_values=cache, use_cache=True).logits)
    trace, kept = pruner.trace.prompt, {"attention": [], "mlp": []}
    for block in range(4):
        for part, keep in (("attention", trace.keep_attention), ("mlp", trace.keep_mlp)):
            after = torch.full((4,), part not in pruner.removed_parts(block))
            kept[part].append(torch.cat([keep[block][0], after]))
    expected = masked_dense(model, kept["attention"], kept["mlp"], pruner.kv, TEXT[0, : PROMPT + 4])
    assert relative(torch.cat(logits, 1)[0], expected) < DTYPES[finest(name)]


@pytest.mark.parametrize("name", CONFIGS)
def test_removed_parts_in_every_family(name):
    both_ways(name, TokenPruner(StaticRouter(), Schedule([0.0, 0.0, 0.3, 0.5]), kv="keep", removed=REMOVED))


@pytest.mark.parametrize("router", [lambda: GemFilterSelector(2), CumulativeSelector])
@pytest.mark.parametrize("name", CONFIGS)
def test_looks_and_cascades_in_every_family(name, router):
    both_ways(name, TokenPruner(router(), Schedule([0.0, 0.3, 0.5, 0.6]), kv="evict"))


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_no_selector_asks_the_device(selector, kv):
    pruner = TokenPruner(SELECTORS[selector](), Schedule([0.0, 0.3, 0.6, 0.6]), kv=kv, removed=[(3, "mlp")])
    model, text = on_meta("llama"), torch.zeros(2, 20, dtype=torch.long, device="meta")
    with torch.no_grad(), pruner(model):
        cache = model(text, use_cache=True).past_key_values
        model(text[:, :1], past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == ([21, 15, 9, 9] if kv == "evict" else [21] * 4)
