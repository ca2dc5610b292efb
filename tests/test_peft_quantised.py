"""Adapters (peft) and quantised weights (torchao): as exact as a plain model, or refused in words."""

import pytest
import torch
from families import family
from test_engine import state_of
from test_families import SCHEDULE, TEXT, check, relative

from ftp_lightning import DynamicRouter, Schedule, StaticRouter, TokenPruner, UserError
from ftp_lightning.costs.flops import decode_bytes, flops_reduction
from ftp_lightning.costs.per_block import block_costs
from ftp_lightning.models import model_identity
from ftp_lightning.pruning.family import find_blocks, find_mlp

KV = ("evict", "keep")
pytestmark = [  # of peft, transformers and torch.ao, none of them ours to heed
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        ".*is_gradient_checkpointing",
        "torch.ao.quantization",
        ".*quantized tensor",
        "TorchaoLora",
        "Position",
    )
]


def pruner_of(kv, parts="block"):
    torch.manual_seed(3)
    return TokenPruner(DynamicRouter(), SCHEDULE, kv=kv, parts=parts)


# ---------------------------------------------------------------- adapters

ADAPTERS = {
    "lora": ("LoraConfig", {"target_modules": ["q_proj", "v_proj"]}),
    "lora_everywhere": ("LoraConfig", {"target_modules": "all-linear"}),
    "dora": ("LoraConfig", {"target_modules": "all-linear", "use_dora": True}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
}


def adapter_config(name, **changes):
    peft = pytest.importorskip("peft")
    kind, settings = ADAPTERS[name]
    rank = {"r": 2} if kind == "LoraConfig" else {}
    return getattr(peft, kind)(task_type="CAUSAL_LM", **rank | settings | changes)


def adapted(config, base="llama", dtype=torch.float64, model=None):
    """A peft model whose adapter does something."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(family(base, dtype) if model is None else model, config).eval()
    randomise(model)
    return model.requires_grad_(False)


def randomise(model, seed=5):
    chance = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if any(mark in name for mark in ("lora_A", "lora_B", "ia3_l", "prompt_encoder")):
            weight.data = 0.3 * torch.randn(weight.shape, generator=chance, dtype=weight.dtype)


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_equal_the_masked_oracle(name, kv):
    model = adapted(adapter_config(name))
    plain = family("llama")
    assert relative(model(TEXT).logits, plain(TEXT).logits) > 0.1
    for attached in (model, model.base_model.model):  # as peft wraps it, and what is inside
        check(attached, pruner_of(kv), [18, 12], 4, "left", [1, 3], 1e-11)
        check(attached, pruner_of(kv, "attention+mlp"), [18, 12], 3, "left", [3], 1e-11)


@pytest.mark.parametrize("base", ["opt", "gpt2", "gpt_neox"])
def test_adapters_on_other_families(base):
    targets = {"opt": ["q_proj", "fc1"], "gpt2": ["c_attn", "c_fc"], "gpt_neox": ["query_key_value", "dense_h_to_4h"]}
    config = adapter_config("lora", target_modules=targets[base], fan_in_fan_out=base == "gpt2")
    model = adapted(config, base)
    for parts in ("block", "attention+mlp"):  # OPT's two feed-forward maps are told apart with an adapter on one
        check(model, pruner_of("keep", parts), [18, 12], 3, "left", [3], 1e-11)


@torch.no_grad()
def test_generate_and_what_is_left_after_detach():
    model = adapted(adapter_config("lora_everywhere"), dtype=torch.float32)
    asked = {"attention_mask": torch.ones_like(TEXT), "max_new_tokens": 5, "do_sample": False}
    model.generate(input_ids=TEXT, **asked)  # peft's generate leaves a trace of its own
    before, dense = state_of(model), model(TEXT).logits
    texts = []
    for attached in (model, model.base_model.model):
        pruner = TokenPruner(StaticRouter(), Schedule.uniform(4, 0.5), kv="keep")
        with pruner(attached):
            texts.append(model.generate(input_ids=TEXT, **asked))
            assert pruner.trace.prompt.sparsity == [0.5] * 4
            with pytest.raises(UserError, match="use_cache=False"):
                model.generate(input_ids=TEXT, use_cache=False, **asked)
    assert torch.equal(*texts) and texts[0].shape == (4, 35)
    assert state_of(model) == before and torch.equal(model(TEXT).logits, dense)
    with TokenPruner(StaticRouter(), Schedule.uniform(4, 0.5), kv="keep")(merged := model.merge_and_unload()):
        assert torch.equal(merged.generate(input_ids=TEXT, **asked), texts[0])


@torch.no_grad()
def test_adapters_are_switched_while_attached():
    model = adapted(adapter_config("lora"))
    pruner = pruner_of("keep")
    with pruner(model):
        first = model(TEXT).logits
        model.add_adapter("second", adapter_config("lora_everywhere"))
        randomise(model, seed=6)
        model.set_adapter("second")
        second = model(TEXT).logits
        with model.disable_adapter():
            none = model(TEXT).logits
    with pruner(model):
        assert torch.equal(model(TEXT).logits, second)
    check(model, pruner, [18, 12], 4, "left", [1, 3], 1e-11)
    with pruner(plain := family("llama")):
        assert torch.equal(plain(TEXT).logits, none)
    assert relative(first, second) > 0.1 and relative(none, second) > 0.1
    assert not any("forward" in module.__dict__ for module in model.modules())
    # FLOPs are those of the adapter in use: rank 2 on queries and output, 2 * 2 * (32 + 32) each; then on queries alone
    assert block_costs(model)[0].attention == 4096 + 2 * 256
    model.set_adapter("default")
    assert block_costs(model)[0].attention == 4096 + 256


@torch.no_grad()
def test_virtual_tokens_are_tokens_of_the_prompt():
    """Prompt tuning puts 3 tokens before the text: counted, ranked and skipped like others; the first is the sink."""
    peft = pytest.importorskip("peft")
    model = adapted(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for attached in (model, model.base_model):
        pruner = TokenPruner(StaticRouter(), SCHEDULE, kv="keep")
        with pruner(attached):
            ids = model.generate(input_ids=TEXT[:1, :13], max_new_tokens=3, do_sample=False)
            keep = pruner.trace.prompt.keep
        assert keep[0].shape == (1, 16) and [int(k.sum()) for k in keep] == [10, 16, 16, 6]
    # the same as a text of 16 embeddings
    plain, start = family("llama"), model.get_prompt(1)
    embeddings = torch.cat([start, plain.get_input_embeddings()(TEXT[:1, :13])], 1)
    with pruner(plain):
        again = plain.generate(
            inputs_embeds=embeddings, attention_mask=torch.ones(1, 16, dtype=torch.long), max_new_tokens=3,
            do_sample=False,
        )  # fmt: skip
    assert torch.equal(ids[:, 13:], again)


REFUSED = {
    "PrefixTuningConfig": ({"num_virtual_tokens": 3}, r"'default' \(PREFIX_TUNING\) fills the cache before the prompt"),
    "AdaptionPromptConfig": ({"adapter_layers": 2, "adapter_len": 3}, "block 2: its attention is inside a Adapted"),
    "LoraConfig": ({"alora_invocation_tokens": [5, 6], "target_modules": ["q_proj"]}, "activated LoRA"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_are_not_linear_maps_are_refused(kind):
    peft = pytest.importorskip("peft")
    settings, sentence = REFUSED[kind]
    model = adapted(getattr(peft, kind)(task_type="CAUSAL_LM", **settings))
    with pytest.raises(UserError, match=f"cannot be pruned.*{sentence}"):
        pruner_of("keep").attach(model)


def test_adapters_weighed_token_by_token_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    adapted(adapter_config("lora"), dtype=torch.float32).save_pretrained(tmp_path)
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={"one": str(tmp_path)})
    model = peft.get_peft_model(family("llama", torch.float32, use_cache=False), config)
    with pytest.raises(UserError, match=r"\(XLORA\) weighs its adapters token by token"):
        pruner_of("keep").attach(model)


def test_an_adapted_model_has_one_identity(tmp_path):
    model = adapted(adapter_config("lora"))
    plain, inner = family("llama"), model.base_model.model
    assert model_identity(model) == model_identity(inner) != model_identity(plain)
    pruner_of("keep").save(tmp_path / "p", model=model)
    with TokenPruner.load(tmp_path / "p")(inner):
        pass
    with pytest.raises(UserError, match="another base"):
        TokenPruner.load(tmp_path / "p").attach(plain)
    assert model_identity(model.unload()) == model_identity(plain)


# ---------------------------------------------------------------- quantised weights

WIDE = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
QUANTISED = {  # name: (settings, tolerance)
    "Int8WeightOnlyConfig": ({}, 1e-5),
    "IntxWeightOnlyConfig": ({}, 1e-5),
    "Float8WeightOnlyConfig": ({}, 1e-5),
    # activations are rounded to 8 bit, token by token: a difference of 1e-7 may move one by a step of 1 / 127
    "Int8DynamicActivationInt8WeightConfig": ({}, 5e-2),
    "Int8DynamicActivationIntxWeightConfig": ({}, 5e-2),
    "Int4WeightOnlyConfig": ({"group_size": 32}, 2e-2),
}


def quantised(name, **changes):
    """A tiny model with torchao's weights; skipped where torchao cannot make them here."""
    torchao = pytest.importorskip("torchao.quantization")
    settings, _ = QUANTISED[name]
    model = family("llama", torch.bfloat16 if "Int4" in name else torch.float32, **WIDE)
    try:
        torchao.quantize_(model, getattr(torchao, name)(**settings | changes))
    except ImportError as error:  # int4 wants a package of kernels
        pytest.skip(f"torchao cannot make {name}: {error}")
    return model


@pytest.mark.torchao
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_models_equal_the_masked_oracle(name, kv):
    model = quantised(name)
    for parts in ("block", "attention+mlp"):
        check(model, pruner_of(kv, parts), [18, 12], 4, "left", [1, 3], QUANTISED[name][1])


@pytest.mark.torchao
def test_adapters_on_quantised_weights():
    model = adapted(adapter_config("lora_everywhere"), model=quantised("Int8WeightOnlyConfig"))
    for kv in KV:
        check(model, pruner_of(kv), [18, 12], 4, "left", [1, 3], 1e-4)


@pytest.mark.torchao
def test_costs_of_quantised_weights_are_read_as_they_are_stored(tmp_path):
    plain, model = family("llama", torch.float32, **WIDE), quantised("Int8WeightOnlyConfig")
    for ours, theirs in zip(block_costs(model), block_costs(plain)):
        assert (ours.keys_values, ours.other, ours.pair) == (theirs.keys_values, theirs.other, theirs.pair)
        assert 0.25 < ours.weight_bytes / theirs.weight_bytes < 0.28  # a byte for four, and a scale per output
    assert decode_bytes(model, block_costs(model), [9] * 4) < decode_bytes(plain, block_costs(plain), [9] * 4)
    assert flops_reduction(model, SCHEDULE, 64, "keep") == flops_reduction(plain, SCHEDULE, 64, "keep")
    assert model_identity(model) == model_identity(quantised("Int8WeightOnlyConfig")) != model_identity(plain)
    pruner_of("keep").save(tmp_path / "p", model=model)
    with TokenPruner.load(tmp_path / "p")(model):
        pass
    with pytest.raises(UserError, match="another base"):
        TokenPruner.load(tmp_path / "p").attach(plain)


@pytest.mark.torchao
def test_scales_over_all_tokens_of_a_call_are_refused():
    """A gathered call holds other tokens than the dense one: under one scale per call every token would change."""
    sentence = "scale a call's tokens together"
    dynamic = torch.ao.quantization.quantize_dynamic(
        family("llama", torch.float32), {torch.nn.Linear}, dtype=torch.qint8
    )
    with pytest.raises(UserError, match=sentence):
        pruner_of("keep").attach(dynamic)
    torchao = pytest.importorskip("torchao.quantization")
    with pytest.raises(UserError, match=sentence):
        model = quantised("Int8DynamicActivationInt8WeightConfig", granularity=torchao.PerTensor())
        pruner_of("keep").attach(model)


def test_a_feed_forward_part_is_found_under_adapters():
    model = adapted(adapter_config("lora", target_modules=["fc1"]), "opt")
    entry, leave = find_mlp(find_blocks(model)[0])
    assert entry is not leave and (entry.out_features, leave.out_features) == (64, 32)
