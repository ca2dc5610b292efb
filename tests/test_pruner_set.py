"""A setting that is assigned to a pruner takes effect or is refused; a copied pruner is one of its own."""

import copy
import math

import pytest
import torch
from test_engine import seeded, tiny_llama
from torch import nn

from ftp_lightning import DynamicRouter, RandomRouter, Schedule, TokenPruner
from ftp_lightning.errors import UserError

SCHEDULE, OTHER = Schedule([0.0, 0.3, 0.6, 0.4]), Schedule([0.0, 0.0, 0.5, 0.5])
IDS = torch.randint(3, 64, (2, 17), generator=torch.Generator().manual_seed(0))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def pruned(model, pruner) -> torch.Tensor:
    with pruner(model):
        return logits(model)


SETTINGS = {
    "schedule": OTHER, "router": RandomRouter(3), "kv": "keep", "choice": "threshold", "decode": "strict",
    "threshold": 0.4, "least_tokens": 30, "attention": "exact", "parts": "mlp", "removed": [(2, "mlp")],
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_is_assigned_is_as_if_given(name):
    model, pruner = tiny_llama(), TokenPruner(seeded(DynamicRouter), SCHEDULE)
    setattr(pruner, name, SETTINGS[name])
    wanted = TokenPruner(seeded(DynamicRouter), SCHEDULE).changed(**{name: SETTINGS[name]})
    assert pruner.settings() == wanted.settings() and pruner.identity() == wanted.identity()
    assert torch.equal(pruned(model, pruner), pruned(model, wanted))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule([0.0] * 4)], ids=["sparse", "dense"])
def test_none_is_assigned_while_the_pruner_is_attached(name, schedule):
    model, pruner = tiny_llama(), TokenPruner(seeded(DynamicRouter), schedule)
    before = pruner.identity()
    with pruner(model):
        expected = logits(model)
        with pytest.raises(UserError, match=f"{name} .*attached"):
            setattr(pruner, name, SETTINGS[name])
        assert pruner.identity() == before and torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "name, value",
    [("schedule", None), ("kv", "all"), ("threshold", 2.0), ("skip", "mean"), ("decode", "none")],
)
def test_an_assigned_value_is_checked(name, value):
    pruner = TokenPruner(seeded(DynamicRouter), SCHEDULE)
    before = pruner.identity()
    with pytest.raises(ValueError):
        setattr(pruner, name, value)
    assert pruner.identity() == before


def test_a_pruner_copied_alone_is_attached_to_nothing():
    model, second, pruner = tiny_llama(), tiny_llama(), TokenPruner(seeded(DynamicRouter), SCHEDULE)
    expected, stock = pruned(model, pruner), logits(model)
    pruner.attach(model)
    for other in (copy.deepcopy(pruner), copy.copy(pruner)):
        assert torch.equal(pruned(second, other), expected)
        other.detach()
        assert torch.equal(logits(model), expected) and model.pruner is pruner
    deep = copy.deepcopy(pruner)
    with torch.no_grad():
        for weight in deep.router.parameters():
            weight.zero_()
    assert torch.equal(logits(model), expected) and not torch.equal(pruned(second, deep), expected)
    pruner.detach()
    assert torch.equal(logits(model), stock)


class Holder(nn.Module):
    """A user's module that holds both, in either order."""

    def __init__(self, model, pruner, first):
        super().__init__()
        for name in ("pruner", "model") if first else ("model", "pruner"):
            setattr(self, name, {"model": model, "pruner": pruner}[name])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hold", [Holder, lambda model, pruner, first: (pruner, model) if first else (model, pruner)])
def test_a_model_copied_with_its_pruner_is_pruned_by_the_copy(hold, first):
    model, pruner = tiny_llama(), TokenPruner(seeded(DynamicRouter), SCHEDULE)
    expected, stock = pruned(model, pruner), logits(model)
    pruner.attach(model)
    held = copy.deepcopy(hold(model, pruner, first))
    found = (held.model, held.pruner) if isinstance(held, Holder) else held if not first else held[::-1]
    assert found[0].pruner is found[1] is not pruner and found[1].trace is not pruner.trace
    assert torch.equal(logits(found[0]), expected)
    found[1].detach()
    assert torch.equal(logits(found[0]), stock) and torch.equal(logits(model), expected)
    found[1].schedule = OTHER
    found[1].attach(found[0])
    pruner.detach()
    assert torch.equal(logits(model), stock) and not torch.equal(logits(found[0]), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_router_that_would_not_load_is_not_saved(value, tmp_path):
    pruner = TokenPruner(seeded(DynamicRouter), SCHEDULE)
    with torch.no_grad():
        pruner.router.mlp[0].weight[0, 0] = value
    with pytest.raises(UserError, match="not finite"):
        pruner.save(tmp_path / "pruned")
    assert not list(tmp_path.iterdir())
