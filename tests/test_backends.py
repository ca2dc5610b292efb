"""Attention backends: the same outputs and scores beside SDPA, FlashAttention's calling convention and eager."""

import pytest
import torch
import torch.nn.functional as F
from families import family
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ftp_lightning import RandomRouter, Schedule, TokenPruner
from ftp_lightning.errors import UserError
from ftp_lightning.pruning import attention as engine_attention
from ftp_lightning.pruning.attention import Sight, _chunked_sdpa
from ftp_lightning.pruning.kept import Kept, Tokens, visible_keys
from ftp_lightning.routing import Router
from ftp_lightning.routing.base import Needs

TEXT = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(1))
SCHEDULE = Schedule([0.0, 0.3, 0.6, 0.4])


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


class Spy(Router):
    """Random decisions that read the table, and remember it."""

    needs = Needs(attention=True)

    def __init__(self):
        super().__init__()
        self.random, self.tables = RandomRouter(2), {}

    def score(self, context):
        self.tables[context.block] = context.attention.clone()
        return self.random.score(context)


def flash_like(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What FlashAttention computes: causal from the bottom right, padding by a (B, S) mask, no other masks."""
    assert attention_mask is None or attention_mask.dim() == 2
    flash_like.calls += 1
    queries, keys = query.shape[2], key.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None, -keys:].bool()
        mask = mask | ~mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


@pytest.fixture
def flash_name():
    # a name with "flash" in it would make transformers look for that kernel on the Hub
    ALL_ATTENTION_FUNCTIONS.register("varlen_like", flash_like)
    ALL_MASK_ATTENTION_FUNCTIONS.register("varlen_like", flash_attention_mask)
    flash_like.calls = 0
    yield "varlen_like"
    del (
        ALL_ATTENTION_FUNCTIONS._global_mapping["varlen_like"],
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping["varlen_like"],
    )


@torch.no_grad()
def prefill_and_continue(model, pruner, padded):
    mask = torch.ones(2, 24, dtype=torch.long)
    if padded:
        mask[1, :7] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with pruner(model):
        first = model(TEXT[:, :20], attention_mask=mask[:, :20], position_ids=position[:, :20], use_cache=True)
        cache = first.past_key_values
        more = model(TEXT[:, 20:24], attention_mask=mask, position_ids=position[:, 20:], past_key_values=cache)
        last = model(TEXT[:, 24:25], position_ids=position[:, -1:] + 1, past_key_values=cache,
                     attention_mask=torch.cat([mask, mask[:, -1:]], 1))  # fmt: skip
    return torch.cat([first.logits, more.logits, last.logits], 1), mask[:, :20].bool()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_backends_agree(flash_name, kv, padded):
    found = {}
    for name in ("sdpa", "eager", flash_name):
        model, spy = family("llama", torch.float32, "sdpa"), Spy()
        model.set_attn_implementation(name)
        logits, real = prefill_and_continue(model, TokenPruner(spy, SCHEDULE, kv=kv, window=5), padded)
        found[name] = logits, spy.tables
    # the dense block in all three forwards; and where rows are alike the prefill of `evict`, and what follows it
    assert flash_like.calls == (3 if padded and kv == "evict" else 9)
    whole = torch.cat([real, real.new_ones(2, 5)], 1)
    for name in ("sdpa", flash_name):
        assert relative(found[name][0][whole], found["eager"][0][whole]) < 1e-5
        for block, table in found["eager"][1].items():
            assert torch.allclose(found[name][1][block][real], table[real], atol=1e-5)


def test_unknown_and_paged_backends_are_refused():
    model = family("llama", torch.float32)
    ALL_ATTENTION_FUNCTIONS.register("unmasked", flash_like)  # and no mask function
    try:
        model.set_attn_implementation("unmasked")
        with pytest.raises(UserError, match="'unmasked' cannot be pruned"):
            TokenPruner(RandomRouter(), SCHEDULE).attach(model)
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["unmasked"]
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "gpt_neox", "gpt2", "opt", "phi3"])
def test_scores_are_those_of_eager_weights(name, exact):
    """Block 1's router reads what block 0's T x T weights, as eager attention returns them, say."""
    model = family(name, torch.float32, "eager")
    spy = Spy()
    pruner = TokenPruner(spy, SCHEDULE, attention="exact" if exact else "window", window=6)
    with torch.no_grad(), pruner(model):
        weights = model(TEXT, use_cache=False, output_attentions=True).attentions[0]
    sees = weights.sum(1) > 0  # (B, T, T): exactly the visible pairs have a weight
    first = 0 if exact else TEXT.shape[1] - 6
    for row in range(2):
        for j in range(TEXT.shape[1]):
            said = [
                float(weights[row, :, i, j].mean()) * int(sees[row, i].sum())
                for i in range(first, TEXT.shape[1])
                if sees[row, i, j]
            ]
            expected = sum(said) / len(said) if said else 1.0
            assert float(spy.tables[1][row, j]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_chunked_attention_equals_one_full_mask(data):
    """Key ranges leave out nothing that a chunk sees: kept queries over all keys or over kept ones, past, windows."""
    batch, past, new = (data.draw(st.integers(*span)) for span in ((1, 3), (0, 9), (1, 20)))
    kept = data.draw(st.lists(st.integers(1, new), min_size=batch, max_size=batch))
    complete, window = data.draw(st.booleans()), data.draw(st.sampled_from([None, 1, 4, 12]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    keep = torch.zeros(batch, new, dtype=torch.bool)
    for row, n in enumerate(kept):
        keep[row, torch.randperm(new, generator=generator)[:n]] = True
    rows = Kept(keep, kept)
    queries = Tokens(rows.index + past, rows.valid, rows.even)
    before = Tokens(torch.arange(past).expand(batch, past), torch.ones(batch, past, dtype=torch.bool), True)
    every = Tokens(torch.arange(past, past + new).expand(batch, new), torch.ones(batch, new, dtype=torch.bool), True)
    keys = before.followed_by(every if complete else queries)
    q, k, v = (
        torch.randn(batch, heads, n, 8, generator=generator, dtype=torch.float64)
        for heads, n in ((4, rows.width), (2, keys.slots.shape[1]), (2, keys.slots.shape[1]))
    )
    sight = Sight(queries, keys, window, new if complete else rows.width, complete=complete)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine_attention.QUERY_CHUNK, "cpu", data.draw(st.integers(1, 7)))
        found = _chunked_sdpa(sight, q, k, v, None, 0.0)
    visible = visible_keys(queries.slots, keys, window)
    p = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    expected = (p @ v.repeat_interleave(2, 1)).transpose(1, 2)
    assert torch.allclose(found[rows.valid], expected[rows.valid], atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_a_compiled_model_computes_the_same(kv):
    """In several graphs: the engine's bookkeeping runs between them."""
    model, pruner = family("llama", torch.float32), TokenPruner(RandomRouter(2), SCHEDULE, kv=kv)
    with torch.no_grad(), pruner(model):
        expected = model(TEXT, use_cache=True)
        found = torch.compile(model)(TEXT, use_cache=True)
        assert relative(found.logits, expected.logits) < 1e-5
        more = [model(TEXT[:, :3], past_key_values=out.past_key_values).logits for out in (expected, found)]
    assert relative(*more) < 1e-5
