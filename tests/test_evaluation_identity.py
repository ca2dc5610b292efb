"""Answers are kept by who gave them: whatever may change an answer changes the key, and nothing else does."""

import pytest
import torch
from ftp_models import ftp_models
from tiny import random_llama

from ftp_lightning.baselines.registry import METHODS, Setting
from ftp_lightning.evaluation.harness.answers import asked_identity
from ftp_lightning.models import load_tokenizer
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import DynamicRouter, FixedRouter, RandomRouter, StaticRouter
from ftp_lightning.schedule import Schedule
from ftp_lightning.training.compensation import Compensation, shapes

SCHEDULE = Schedule([0.0, 0.5, 0.7])
SIZES = {"parts": ("block",), "num_blocks": 3, "hidden_size": 32, "rank": 0}


@pytest.fixture(scope="module")
def model():
    return random_llama(300, num_key_value_heads=2)


def router(seed=0, nudge=0.0):
    torch.manual_seed(seed)
    made = DynamicRouter()
    with torch.no_grad():
        next(made.parameters()).view(-1)[0] += nudge
    return made


def compensation(value):
    made = {name: torch.zeros(shape) for name, shape in shapes(**SIZES).items()}
    next(iter(made.values())).view(-1)[0] = value
    return Compensation(tensors=made, **SIZES)


def masks(last):
    return [torch.tensor([[True, True, bool(last)]])] * 3


BASE = {"router": router(), "schedule": SCHEDULE, "kv": "keep", "skip": "mean", "compensation": compensation(1.0)}
CHANGES = {
    "router": {"router": RandomRouter(0)},
    "router state": {"router": router(nudge=1e-6)},
    "schedule": {"schedule": Schedule([0.0, 0.5, 0.6])},
    "kv": {"kv": ["keep", "keep", "evict"]},
    "choice": {"choice": "threshold"},
    "threshold": {"threshold": 0.4},
    "decode": {"decode": "strict"},
    "window": {"window": 8},
    "attention": {"attention": "exact"},
    "removed": {"removed": [(1, "mlp")]},
    "compensation": {"compensation": compensation(1.0 + 1e-6)},
    "skip": {"skip": "identity", "compensation": None},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_pruner_has_another_key(model, change):
    assert asked_identity(model, TokenPruner(**BASE | change)) != asked_identity(model, TokenPruner(**BASE))


def test_an_equal_pruner_has_the_same_key_whatever_it_was_searched_on(model):
    again = BASE | {"router": router(), "schedule": Schedule(SCHEDULE.sparsity, seen={"piqa": 0.5})}
    with (pruner := TokenPruner(**BASE))(model):
        assert asked_identity(model, TokenPruner(**again)) == asked_identity(model, pruner)
    assert asked_identity(model, pruner, mode="prompt") != asked_identity(model, pruner, mode="sequence")
    assert asked_identity(model, None) != asked_identity(model, pruner)


def test_decisions_that_are_fixed_and_seeds_count(model):
    keys = [asked_identity(model, TokenPruner(FixedRouter(masks(last)), None)) for last in (0, 1)]
    keys += [asked_identity(model, TokenPruner(RandomRouter(seed), SCHEDULE)) for seed in (0, 1)]
    apart = FixedRouter(keep_attention=masks(0)), FixedRouter(keep_mlp=masks(0))
    keys += [asked_identity(model, TokenPruner(one, None, parts="attention+mlp")) for one in apart]
    assert len(set(keys)) == len(keys)


def test_dtype_attention_kernel_and_weights_count(model):
    known = asked_identity(model, TokenPruner(StaticRouter(), SCHEDULE))
    others = [random_llama(300, num_key_value_heads=2) for _ in range(3)]
    assert asked_identity(others[0], TokenPruner(StaticRouter(), SCHEDULE)) == known
    others[0].config._attn_implementation = "eager"
    others[1].to(torch.bfloat16)
    with torch.no_grad():
        others[2].lm_head.weight[0, 0] += 1.0
    assert known not in {asked_identity(other, TokenPruner(StaticRouter(), SCHEDULE)) for other in others}


def test_autocast_counts(tmp_path):
    tokenizer = load_tokenizer("embedded")
    with ftp_models(random_llama(len(tokenizer), num_key_value_heads=2), tokenizer) as make:
        books = {make(answers=tmp_path, **how).book._path for how in ({}, {"mixed_precision_dtype": "bfloat16"})}
    assert len(books) == 2


def test_selectors_of_one_kind_with_other_arguments_have_other_identities():
    setting = Setting(random_llama(300, num_hidden_layers=8))
    identities = [str(router.identity()) for router, _ in METHODS["gem_filter"].tries(setting)]
    assert len(set(identities)) == len(identities) > 1
