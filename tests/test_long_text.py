"""8,192 tokens through twelve blocks: prefill and 64 generated tokens, in bounded memory."""

import gc

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ftp_lightning import DynamicRouter, Schedule, TokenPruner
from ftp_lightning.evaluation.speed import memory

TOKENS, BLOCKS = 8192, 12
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2 * TOKENS, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def generate(model):
    ids = torch.randint(3, 256, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False, return_dict_in_generate=True)


def peak(model):
    gc.collect()
    return memory.peak_bytes(lambda: generate(model), model.device)


@pytest.mark.skipif(memory.why_no_peak(torch.device("cpu")) is not None, reason="peak memory cannot be reset here")
def test_peak_memory_is_bounded(model):
    generate(model)
    stock = peak(model)
    for kv in ("evict", "keep"):
        for attention, allowed in (("window", 0.02 * stock + (8 << 20)), ("exact", 1 << 30)):
            pruner = TokenPruner(DynamicRouter(), Schedule.uniform(BLOCKS, 0.4), kv=kv, attention=attention)
            with pruner(model):
                assert peak(model) <= stock + allowed, (kv, attention)


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_the_cache_holds_what_the_schedule_says(model, kv):
    pruner = TokenPruner(DynamicRouter(), Schedule.uniform(BLOCKS, 0.4), kv=kv)
    with pruner(model):
        cache = generate(model).past_key_values
    kept = TOKENS - round(0.4 * TOKENS) if kv == "evict" else TOKENS
    assert [layer.keys.shape[2] for layer in cache.layers] == [kept + 63] * BLOCKS
    assert cache.get_seq_length() == TOKENS + 63
