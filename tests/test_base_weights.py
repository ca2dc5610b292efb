"""A pruner knows its base model in every dtype, and no other one."""

import itertools
import json

import pytest
import torch
from families import family

from ftp_lightning import Schedule, StaticRouter, TokenPruner, UserError, load_pruned
from ftp_lightning.models import load_model, load_tokenizer, model_identity
from ftp_lightning.models.weights import same_weights, weights_record

SCHEDULE = Schedule([0.0, 0.5, 0.5, 0.5])
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weights(seed=0, scale=0.05):
    made = torch.Generator().manual_seed(seed)
    tensors = {"a": (300, 70), "b": (70,), "c": (2, 5)}
    return {name: scale * torch.randn(shape, generator=made) for name, shape in tensors.items()} | {
        "constant": torch.full((1000,), 1.0 + 2.0**-9 + 2.0**-12)  # all of it is rounded the same way
    }


def cast(tensors, dtype):
    return {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize(("made", "found"), list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("scale", [1e-6, 0.05])
def test_one_base_is_the_same_in_every_dtype_and_another_is_not(stored, made, found, scale):
    base = cast(weights(scale=scale), stored)
    record = json.loads(json.dumps(weights_record(cast(base, made))))
    assert same_weights(record, cast(base, found))
    if scale > 1e-5:
        assert not same_weights(record, cast(weights(1, scale), found))
        few = {name: tensor.clone().float() for name, tensor in base.items()}
        few["a"][151, 33] += 2 * scale
        few["a"][20, 3] -= 2 * scale
        assert not same_weights(record, cast(few, found))


@pytest.mark.parametrize("found", DTYPES)
def test_a_single_weight_that_bfloat16_can_tell_apart_is_noticed(found):
    base = weights()
    record = weights_record(base)
    base["a"][10, 10] *= 1.02
    assert not same_weights(record, cast(base, found))
    base = weights()
    base["a"][0, 0], base["a"][0, 1] = base["a"][0, 1].clone(), base["a"][0, 0].clone()
    assert not same_weights(record, cast(base, found))


@pytest.fixture(scope="module", params=DTYPES)
def folder(request, tmp_path_factory):
    """A base model stored in some dtype, and a pruner made of it in float32."""
    place = tmp_path_factory.mktemp(request.param)
    family("llama", DTYPES[request.param]).save_pretrained(place / "base")
    load_tokenizer().save_pretrained(place / "base")
    return place


def save(folder, dtype="float32", seed=0):
    model = load_model(str(folder / "base"), dtype=dtype)
    TokenPruner(StaticRouter(), SCHEDULE).save(folder / "p", base=str(folder / "base"), model=model)
    return model


@pytest.mark.parametrize("made", ["float32", "bfloat16", "float16"])
def test_a_pruner_loads_with_its_base_in_every_dtype(folder, made):
    save(folder, made)
    for dtype in DTYPES:
        assert load_pruned(folder / "p", dtype=dtype)[0].dtype == DTYPES[dtype]
        model = load_model(str(folder / "base"), dtype=dtype)
        for other in (family("llama", DTYPES[dtype], seed=1), model):
            pruner = TokenPruner.load(folder / "p")
            if other is model:
                model.model.layers[2].mlp.up_proj.weight.data[3, 5] += 0.5
            with pytest.raises(UserError, match="another base model"):
                pruner.attach(other)


def old_record(folder, model):
    """The record as older versions wrote it: the sample of `model_identity`, no checksums of all weights."""
    path = folder / "p" / "pruner.json"
    record = json.loads(path.read_text()) | {"base_identity": model_identity(model)}
    record.pop("sha256")
    path.write_text(json.dumps(record))


def test_records_of_older_versions_still_load(folder, recwarn):
    old_record(folder, save(folder))
    for dtype in DTYPES:
        load_pruned(folder / "p", dtype=dtype)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(UserError, match="another base model"):
            TokenPruner.load(folder / "p").attach(family("llama", DTYPES[dtype], seed=1))
    with pytest.raises(UserError, match="hidden_size"):
        TokenPruner.load(folder / "p").attach(family("llama", torch.float16, hidden_size=16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_model_is_read_once_until_it_changes_in_whatever_way(folder, dtype, monkeypatch):
    from ftp_lightning.models import identity

    model, asked = save(folder, dtype), []
    monkeypatch.setattr(identity, "same_weights", lambda *two: asked.append(1) or same_weights(*two))
    for _ in range(3):
        with TokenPruner.load(folder / "p")(model):
            pass
    assert len(asked) == 1
    model.model.layers[2].mlp.up_proj.weight.data[3, 5] += 0.5  # torch does not count this one
    with pytest.raises(UserError, match="another base model"):
        TokenPruner.load(folder / "p").attach(model)


def test_a_large_model_is_read_once_until_it_changes(folder, monkeypatch):
    from ftp_lightning.models import identity

    model, asked = save(folder), []
    monkeypatch.setattr(identity, "_SMALL", 0)
    monkeypatch.setattr(identity, "same_weights", lambda *two: asked.append(1) or same_weights(*two))
    for _ in range(3):
        with TokenPruner.load(folder / "p")(model):
            pass
    assert len(asked) == 1
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 5] += 0.5
    with pytest.raises(UserError, match="another base model"):
        TokenPruner.load(folder / "p").attach(model)
