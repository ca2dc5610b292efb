"""Models that `torch.compile` has wrapped: a pruner works through either handle and leaves no trace.

Tracing takes seconds: but for two tests the handles run as they are written (stance "force_eager").
"""

import pytest
import torch
from families import family

from ftp_lightning import RandomRouter, Schedule, TokenPruner, UserError
from ftp_lightning.models import model_identity
from ftp_lightning.pruning.family import find_blocks

SCHEDULE = Schedule([0.0, 0.5, 0.5, 0.5])
IDS = torch.randint(3, 64, (1, 14), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}


@pytest.fixture
def untraced():
    with torch.compiler.set_stance("force_eager"):
        yield


def compiled(module):
    return torch.compile(module, backend="eager")


def traces(model):
    return [name for name, module in model.named_modules() if {"forward", "generate"} & set(module.__dict__)]


@torch.no_grad()
@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_a_pruner_on_a_compiled_model_prunes_through_both_handles(kv, untraced):
    model, pruner = family("llama", torch.float32), TokenPruner(RandomRouter(1), SCHEDULE, kv=kv)
    handle, dense = compiled(model), model(IDS).logits
    with pruner(model):
        logits, text = model(IDS).logits, model.generate(IDS, **GREEDY)
    assert not torch.equal(logits, dense)
    with pruner(handle):
        for one in (handle, model):
            torch.testing.assert_close(one(IDS).logits, logits)
            assert torch.equal(one.generate(IDS, **GREEDY), text)
        with pytest.raises(UserError, match="attached to this model"):
            TokenPruner(RandomRouter(1), SCHEDULE).attach(model)
    assert not traces(model) and "generate" not in handle.__dict__
    torch.testing.assert_close(handle(IDS).logits, dense)
    torch.testing.assert_close(model(IDS).logits, dense)
    pruner.attach(handle)
    torch.testing.assert_close(handle(IDS).logits, logits)
    pruner.detach()
    assert not traces(model)


@torch.no_grad()
@pytest.mark.parametrize("what", ["handle", "blocks"])
def test_what_dynamo_traces_is_pruned(what):
    """Also where the model has run compiled and dense before."""
    torch._dynamo.reset()
    model = family("llama", torch.float32, num_hidden_layers=2)
    pruner = TokenPruner(RandomRouter(1), Schedule([0.0, 0.5]), kv="keep")
    with pruner(model):
        logits = model(IDS).logits
    handle = model
    if what == "handle":
        handle = compiled(model)
    else:
        for block in model.model.layers:
            block.compile(backend="eager")
    dense = handle(IDS).logits
    with pruner(handle):
        torch.testing.assert_close(handle(IDS).logits, logits)
        assert pruner.trace.sparsity == [0.0, 0.5]
    torch.testing.assert_close(handle(IDS).logits, dense)
    assert not torch.equal(logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("what", ["decoder", "in place", "forward"])
def test_what_is_compiled_inside_a_model(what, untraced):
    model, pruner = family("llama", torch.float32), TokenPruner(RandomRouter(1), SCHEDULE, kv="keep")
    dense = model(IDS).logits
    with pruner(model):
        logits = model(IDS).logits
    if what == "decoder":
        model.model = compiled(model.model)
    elif what == "in place":
        model.compile(backend="eager")
    else:
        model.forward = compiled(model.forward)
    torch.testing.assert_close(model(IDS).logits, dense)
    with pruner(model):
        torch.testing.assert_close(model(IDS).logits, logits)
    torch.testing.assert_close(model(IDS).logits, dense)


def test_blocks_compiled_one_by_one_are_refused():
    model = family("llama", torch.float32)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = compiled(layer)
    with pytest.raises(UserError, match="compiled one by one"):
        TokenPruner(RandomRouter(1), SCHEDULE).attach(model)


def test_a_function_is_no_model():
    """What `torch.compile` makes of a compiled model is a function in some versions."""
    with pytest.raises(UserError, match="is not a model"):
        TokenPruner(RandomRouter(1), SCHEDULE).attach(family("llama").forward)


def test_a_compiled_model_is_the_model_that_was_compiled(tmp_path):
    model = family("llama", torch.float32)
    handle = compiled(model)
    assert model_identity(handle) == model_identity(model) and find_blocks(handle)[0] is find_blocks(model)[0]
    TokenPruner(RandomRouter(1), SCHEDULE).save(tmp_path / "p", base="mine", model=handle)
    with TokenPruner.load(tmp_path / "p")(model), pytest.raises(UserError, match="another base"):
        TokenPruner.load(tmp_path / "p").attach(compiled(family("llama", torch.float32, seed=1)))
