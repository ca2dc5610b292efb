"""Models by name: the embedded one, folders, random shapes, identity, and errors with their remedy."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from ftp_lightning import models
from ftp_lightning.errors import UserError
from ftp_lightning.models import SHAPES, load, load_model, load_tokenizer, model_identity, resolve_device


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_embedded_model_is_frozen_and_fits_its_tokenizer():
    model, tokenizer = load()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32 and len(tokenizer) == model.config.vocab_size == 4096
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    identity = model_identity(model)
    shape = {key: identity[key] for key in ("num_blocks", "hidden_size", "num_heads", "num_kv_heads", "vocab_size")}
    assert list(shape.values()) == [12, 256, 8, 4, 4096] and identity["model_type"] == "llama"


def test_embedded_model_recalls():
    model, tokenizer = load()
    text = (
        "Nora kept the rope in the barn. Grace kept the ledger in the chapel.\nWhere did Grace keep the ledger? In the"
    )
    prompt = torch.tensor([tokenizer.encode(text)])
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(answer[0, prompt.shape[1] :]).startswith(" chapel.")


def test_folder_gives_the_saved_weights(folder):
    model, reference = load_model(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_random_shapes_are_seeded_and_leave_the_global_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (load_model("random:tiny", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert model_identity(first) == model_identity(again) != model_identity(other)
    assert load_model("random:tiny", dtype="bfloat16").dtype == torch.bfloat16
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    assert len(load_tokenizer("random:tiny")) == 4096


def test_shapes_are_the_named_ones():
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in LlamaForCausalLM(models.random_config(name)).parameters()) for name in SHAPES
        }
    assert sizes["llama-7b"] == 6_738_415_616 and sizes["llama-8b"] == 8_030_261_248
    assert sizes["llama-13b"] == 13_015_864_320 and sizes["llama3-8b"] == 8_030_261_248
    # Qwen has no bias on the output projection, this shape has
    assert sizes["qwen1.5-7b"] == 7_721_324_544 + 32 * 4096
    assert sizes["qwen2.5-7b"] == 7_615_616_512 + 28 * 3584
    assert sizes["llama-110m"] == 12 * (4 * 768**2 + 3 * 768 * 3072 + 2 * 768) + 2 * 32000 * 768 + 768


def test_identity_knows_weights_not_dtypes(folder):
    exact, rounded = load_model(str(folder)), load_model(str(folder), dtype="bfloat16")
    assert model_identity(exact) == model_identity(rounded)
    exact.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    assert model_identity(exact) != model_identity(rounded)


def test_identity_is_json(folder):
    identity = model_identity(load_model(str(folder)))
    assert json.loads(json.dumps(identity)) == identity


def test_progress_bars_are_as_before(folder):
    logging.enable_progress_bar()
    load_model(str(folder))
    assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "a/b/c", ""])
def test_missing_folder(name):
    with pytest.raises(UserError, match="does not exist" if name else "model is empty"):
        load_model(name)


def test_folders_that_are_no_models(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match="no config.json"):
        load_model(str(empty))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(str(folder))
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="its weights have 6 bytes"):
        load_model(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_model(str(folder))


def test_hub_without_network_names_the_remedy(monkeypatch):
    import transformers

    def refuse(*_args, **options):
        assert options["trust_remote_code"] is False
        raise OSError("We couldn't connect to the Hub\nand more\nand more")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(UserError, match="Did you mean smollm2-135m-instruct"):
        load_model("SmolLM2")
    with pytest.raises(UserError, match="prefetch --model some/model") as caught:
        load_model("some/model")
    assert "HF_HUB_OFFLINE=1" in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_values_are_checked():
    with pytest.raises(UserError, match="random:llama-8b"):
        load_model("random:huge")
    with pytest.raises(UserError, match="random:llama-8b"):
        load_tokenizer("random:huge")
    with pytest.raises(UserError, match="float32, bfloat16"):
        load_model(dtype="int8")
    with pytest.raises(UserError, match="unknown device"):
        resolve_device("gpu")


def test_auto_device_is_what_is_there(monkeypatch):
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert resolve_device("auto").type == expected
    with pytest.raises(UserError, match="does not exist"):
        resolve_device("cuda")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_a_valid_model_without_allocating_it(shape):
    config = models.random_config(shape)
    heads = config.num_attention_heads
    assert config.hidden_size % heads == heads % config.num_key_value_heads == 0
    with torch.device("meta"):
        net = LlamaForCausalLM(config).model
        hidden, positions = torch.zeros(2, 8, config.hidden_size), torch.arange(8)[None]
        output = net.layers[0](hidden, position_embeddings=net.rotary_emb(hidden, positions))
    assert output.shape == hidden.shape and len(net.layers) == config.num_hidden_layers


def test_long_texts_fit_the_shapes_that_are_measured():
    limits = {shape: models.random_config(shape).max_position_embeddings for shape in SHAPES}
    measured = {"tiny": 4096, "llama-110m": 16384, "llama-7b": 16384, "llama-8b": 131072}
    assert {shape: limits[shape] for shape in measured} == measured


def test_random_weights_are_never_made_in_another_precision():
    from torch.utils._python_dispatch import TorchDispatchMode

    made = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dim() == 2 and result.is_floating_point():
                made.add(result.dtype)
            return result

    with Watch():
        load_model("random:tiny", dtype="bfloat16")
    assert made == {torch.bfloat16}


def a_missing_weight(folder):
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def an_unknown_weight(folder):
    change_weights(folder, lambda weights: weights.update({"model.layers.0.extra.weight": torch.zeros(2)}))


def a_weight_of_another_shape(folder):
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.zeros(31)}))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def a_pickle_of_garbage(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def a_quantisation_that_the_weights_lack(folder):
    change_config(folder, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 16})


def a_field_of_another_type(folder):
    change_config(folder, num_hidden_layers="three")


def an_unknown_model_type(folder):
    change_config(folder, model_type="fancy")


def an_unknown_rope(folder):
    change_config(folder, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})


def no_list_of_shards(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (a_missing_weight, "missing model.layers.1.mlp.up_proj.weight"),
        (an_unknown_weight, "unexpected model.layers.0.extra.weight"),
        (a_weight_of_another_shape, "mismatched model.norm.weight ((31,) instead of (32,))"),
        (a_pickle_of_garbage, "cannot be loaded"),
        (a_quantisation_that_the_weights_lack, "are quantised"),
        (a_field_of_another_type, "num_hidden_layers"),
        (an_unknown_model_type, "fancy"),
        (an_unknown_rope, "spiral"),
        (no_list_of_shards, "model.safetensors.index.json"),
    ],
)
def test_folders_that_do_not_load_are_told_in_a_sentence(folder, damage, said, caplog):
    damage(folder)
    with pytest.raises(UserError) as caught:
        load_model(str(folder))
    lines = str(caught.value).splitlines()
    assert said in str(caught.value) and len(lines) <= 3 and max(map(len, lines)) < 400
    assert "transformers.modeling_utils" not in {record.name for record in caplog.records}


def test_loading_says_nothing(folder, caplog):
    load_model(str(folder))
    assert not caplog.records


def test_masks_that_older_versions_stored_are_no_weights(folder):
    change_weights(folder, lambda weights: weights.update({"model.layers.0.attention.masked_bias": torch.zeros(1)}))
    load_model(str(folder))


def test_a_tokenizer_of_a_newer_version(folder):
    load_tokenizer("embedded").save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": {"type": "Newer"}}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(str(folder))
