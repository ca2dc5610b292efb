"""Random cases on real models against the masked oracle, which asks the stock model what it sees."""

import random
from functools import cache

import pytest
import torch
from oracle import masked_dense
from real_models import needs_model

from ftp_lightning import RandomRouter, Schedule, TokenPruner
from ftp_lightning.models import load
from ftp_lightning.routing import UntrainedRouter

MODELS = [pytest.param(name, marks=needs_model(name)) for name in ("smollm2-135m-instruct", "gemma3-270m")]


@cache
def loaded(name):
    return load(name, dtype="float32")[0].eval().requires_grad_(False)


def check_random_case(name, seed):
    """One text under a random schedule, kv mode per block and router."""
    model, rng = loaded(name), random.Random(f"{name}/{seed}")
    blocks, prompt, more = model.config.num_hidden_layers, rng.randint(12, 32), rng.randint(1, 6)
    schedule = Schedule([rng.choice([0.0, 0.0, 0.2, 0.5, 0.8]) for _ in range(blocks - 1)] + [rng.choice([0.0, 0.6])])
    kv = [rng.choice(["evict", "keep"]) for _ in range(blocks)]
    pruner = TokenPruner(rng.choice([RandomRouter(seed), UntrainedRouter()]), schedule, kv=kv)
    ids = torch.randint(100, 20000, (1, prompt + more), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        with pruner(model):
            first = model(ids[:, :prompt], use_cache=True)
            keep = [kept[0].clone() for kept in pruner.trace.keep]
            rest = model(ids[:, prompt:], past_key_values=first.past_key_values).logits
            last = model(ids[:, :prompt], use_cache=True, logits_to_keep=1)
            again = model(ids[:, prompt:], past_key_values=last.past_key_values).logits
        whole = [torch.cat([kept, torch.ones(more, dtype=torch.bool)]) for kept in keep]
        expected = masked_dense(model, whole, whole, pruner.kv, ids[0])
    found = torch.cat([first.logits, rest], 1)[0]
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 2e-4 * scale
    assert (last.logits[0, -1] - expected[prompt - 1]).abs().max() < 2e-4 * scale
    assert (again[0] - expected[prompt:]).abs().max() < 2e-4 * scale


@pytest.mark.parametrize("name", MODELS)
def test_random_cases_equal_the_oracle(name):
    check_random_case(name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_many_random_cases_equal_the_oracle(name):
    for seed in range(1, 30):
        check_random_case(name, seed)
