"""The cost model against torch's own counter, brute-force counting and worked numbers."""

import dataclasses

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import BLOCKS, tiny_llama
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ftp_lightning import Schedule, StaticRouter, TokenPruner
from ftp_lightning.costs import flops
from ftp_lightning.costs import per_block as costs
from ftp_lightning.costs.budget import solve_budget
from ftp_lightning.costs.request import row_costs
from ftp_lightning.errors import UserError
from ftp_lightning.pruning.family import find_attention, find_blocks
from ftp_lightning.pruning.trace import Trace

SCHEDULE = Schedule([0.0, 0.3, 0.6, 0.4])
SHAPE = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FULL_HEADS = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
SMALL_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SHAPE),
    "qwen2": lambda: hf.Qwen2Config(**SHAPE),
    "qwen3": lambda: hf.Qwen3Config(**SHAPE, head_dim=24),
    "mistral": lambda: hf.MistralConfig(**SHAPE, sliding_window=None),
    "mistral with a window": lambda: hf.MistralConfig(**SHAPE, sliding_window=8),
    "gemma2": lambda: hf.Gemma2Config(**SHAPE, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "gemma3": lambda: hf.Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "phi3": lambda: hf.Phi3Config(**SHAPE),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**FULL_HEADS),
    "opt": lambda: hf.OPTConfig(**FULL_HEADS, ffn_dim=128, word_embed_proj_dim=64),
    "gpt2": lambda: hf.GPT2Config(**FULL_HEADS, n_inner=128),
    "mixtral": lambda: hf.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(**SHAPE, **SMALL_EXPERTS, shared_expert_intermediate_size=48),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**SHAPE, **SMALL_EXPERTS, head_dim=16),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **SHAPE | {"num_key_value_heads": 4}, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16,
        v_head_dim=12, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1,
        n_group=1, topk_group=1,
    ),
}  # fmt: skip
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")


def stock(name):
    """A tiny model of a family whose matrix products are all visible to torch's counter."""
    plain = {"experts_implementation": "eager"} if name in MIXTURES else {}
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager", **plain)
    return model.eval().requires_grad_(False)


def matrix_flops(model, tokens, logits=1):
    """(linear maps, products of activations) of one prefill as torch counts them; experts' maps are linear too."""
    ids = torch.randint(3, 64, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, logits_to_keep=logits)
    counts = counter.get_flop_counts()["Global"]
    batched = sum(n for op, n in counts.items() if "bmm" in str(op))
    return sum(n for op, n in counts.items() if "mm" in str(op)) - batched, batched


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_flops_are_those_executed(name):
    """Eager attention computes the whole rectangle of pairs, seen or not."""
    model, tokens = stock(name), 48
    found = flops.block_costs(model)
    linear = flops.head_flops(model) + tokens * sum(cost.keys_values + cost.attention + cost.mlp for cost in found)
    counted, products = matrix_flops(model, tokens)
    assert counted == pytest.approx(linear, rel=0.01)
    assert products == pytest.approx(tokens**2 * sum(cost.pair for cost in found), rel=0.01)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_and_read_bytes_are_those_of_the_tensors(name):
    model, tokens = stock(name), 6
    with torch.no_grad():
        cache = model(torch.randint(3, 64, (1, tokens)), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    dense = Schedule.uniform(3, 0.0)
    assert held == flops.cached_bytes(model, dense, tokens, "keep")
    read = flops.decode_bytes(model, flops.block_costs(model), [tokens] * 3)
    weights = sum(p.nbytes for block in find_blocks(model) for p in block.parameters())
    head = model.get_output_embeddings().weight.nbytes
    assert (read < weights + head + held) if name in MIXTURES else (read == weights + head + held)


def test_what_a_skipped_token_still_runs_goes_by_the_projections():
    """Keys and values; with the queries where the three are fused, which the deposit cannot leave out."""
    sizes = {"llama": 2 * 32, "qwen3": 2 * 2 * 24, "opt": 2 * 64, "phi3": 64 + 2 * 32, "gpt_neox": 192, "gpt2": 192}
    for name, width in sizes.items():
        cost = flops.block_costs(stock(name))[1]
        assert cost.keys_values == 2.0 * 64 * width and cost.keys_values + cost.other > cost.attention > 0, name


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "gpt2", "opt"])
def test_linear_flops_under_keep_are_those_executed_in_every_family(name):
    model, schedule = stock(name), Schedule([0.5, 0.25, 0.9])
    pruner = TokenPruner(StaticRouter(), schedule, kv="keep")
    expected = flops.prompt_flops(without_pairs(model), schedule, 60, "keep", flops.head_flops(model), last_only=True)
    with pruner(model):
        assert matrix_flops(model, 60)[0] == pytest.approx(expected, rel=0.01)


def without_pairs(model):
    return [dataclasses.replace(cost, pair=0.0) for cost in flops.block_costs(model)]


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("schedule", [Schedule.uniform(BLOCKS, 0.0), SCHEDULE])
def test_linear_flops_are_those_executed(kv, schedule):
    model = tiny_llama(torch.float32)
    routed, head = any(schedule.sparsity), flops.head_flops(model)
    expected = flops.prompt_flops(without_pairs(model), schedule, 200, kv, head, last_only=routed)
    with TokenPruner(StaticRouter(), schedule, kv=kv)(model):
        assert matrix_flops(model, 200)[0] == pytest.approx(expected, rel=0.01)


class Adapted(nn.Module):
    """A linear map wrapped as adapters wrap it: its sizes and weight shown again, two factors beside it."""

    def __init__(self, base, rank=3):
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    @property
    def weight(self):
        return self.base_layer.weight


class Packed(nn.Module):
    """A quantised map: two weights of four bits in a byte."""

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = nn.Parameter(torch.zeros(base.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)


def test_wrapped_maps_are_counted_once_and_packed_ones_by_their_logical_size():
    plain, model = (tiny_llama(torch.float32) for _ in range(2))
    block = find_blocks(model)[1]
    attention = find_attention(block)
    attention.q_proj, attention.v_proj = Adapted(attention.q_proj), Adapted(attention.v_proj)
    block.mlp.up_proj = Packed(block.mlp.up_proj)
    before, after = flops.block_costs(plain)[1], flops.block_costs(model)[1]
    assert after.attention - before.attention == 2 * 3 * (32 + 32)
    assert after.keys_values - before.keys_values == 2 * 3 * (32 + 16)
    assert (after.mlp, after.pair, after.cached_bytes) == (before.mlp, before.pair, before.cached_bytes)
    assert before.weight_bytes - after.weight_bytes == 32 * 64 * 3.5 - 4 * 3 * (64 + 48)


# ---------------------------------------------------------------- pairs


def visible(queries, keys, window):
    """Pairs of a boolean mask, by positions."""
    distance = torch.tensor(queries)[:, None] - torch.tensor(keys)[None, :]
    return int(((distance >= 0) & (distance < (window or 10**6))).sum())


@given(st.integers(1, 40), st.integers(1, 6), st.none() | st.integers(1, 50))
@settings(max_examples=150, deadline=None)
def test_pairs_are_those_of_the_mask(kept, stride, window):
    """Kept tokens at the end of every stride, so that they are spread evenly without rounding."""
    tokens = kept * stride
    everyone, chosen = list(range(tokens)), list(range(stride - 1, tokens, stride))
    assert flops.causal_pairs(tokens, tokens, window) == visible(everyone, everyone, window)
    assert flops.causal_pairs(kept, tokens, window) <= visible(chosen, everyone, window)
    if window is None or window % stride == 0:
        assert flops.causal_pairs(kept, tokens, window) == visible(chosen, everyone, window)
    assert costs.evicted_pairs(kept, tokens, window) == visible(chosen, chosen, window)


@given(st.integers(0, 30), st.integers(0, 12), st.none() | st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_continued_pairs_are_those_of_the_mask(before, new, window):
    positions = list(range(before + new))
    expected = visible(positions[before:], positions, window) if new else 0
    assert costs.continued_pairs(before, before, new, window) == expected


def test_causal_pairs():
    assert flops.causal_pairs(5, 5) == 15 and flops.causal_pairs(0, 5) == 0 == costs.evicted_pairs(0, 5, 3)
    assert flops.causal_pairs(1, 6) == 6  # one query spread over six keys stands at the end
    assert flops.causal_pairs(6, 6, 2) == 1 + 5 * 2


# ---------------------------------------------------------------- prompts, requests, bytes


def test_parts_save_what_they_skip():
    costs_, tokens = flops.block_costs(tiny_llama(torch.float32)), 100
    dense, one = (Schedule([s, 0.0, 0.0, 0.0]) for s in (0.0, 0.4))
    total, first, kept = flops.prompt_flops(costs_, dense, tokens, "evict"), costs_[0], 60

    def saved(parts, kv):
        return total - flops.prompt_flops(costs_, one, tokens, kv, parts=parts)

    fewer = (tokens - kept) * first.attention
    triangle, keys = tokens * (tokens + 1) / 2, (tokens - kept) * first.keys_values
    evict = fewer + keys + (triangle - kept * (kept + 1) / 2) * first.pair
    keep = fewer + (triangle - tokens * (kept + 1) / 2) * first.pair
    assert saved("attention", "evict") == pytest.approx(evict) and saved("attention", "keep") == pytest.approx(keep)
    for kv, attention in {"evict": evict, "keep": keep}.items():
        assert saved("mlp", kv) == pytest.approx((tokens - kept) * first.mlp)
        assert saved("block", kv) == saved("attention+mlp", kv) == pytest.approx(saved("mlp", kv) + attention)
    with pytest.raises(ValueError, match="parts is 'head'"):
        saved("head", "keep")


def test_a_window_cuts_pairs_for_dense_and_pruned():
    model = stock("mistral with a window")
    cost = flops.block_costs(model)[0]
    assert cost.window == 8
    total = flops.prompt_flops([cost], Schedule([0.0]), 40, "keep")
    assert total == 40 * (cost.keys_values + cost.other) + cost.pair * (8 * 9 / 2 + 32 * 8)
    assert [c.window for c in flops.block_costs(stock("gemma2"))] == [8, None, 8]


def test_a_request_is_its_prompt_and_the_forwards_after_it():
    """The prompt of n + m tokens, dense, costs what its first n cost and the m behind them, but for the heads."""
    model = tiny_llama(torch.float32)
    costs_, dense = flops.block_costs(model), Schedule.uniform(BLOCKS, 0.0)
    parts = flops.prompt_flops(costs_, dense, 30, "keep", 5.0)
    parts += flops.continuation_flops(costs_, 30, 12, [30] * BLOCKS, 5.0)
    assert parts == pytest.approx(flops.prompt_flops(costs_, dense, 42, "keep", 13 * 5.0))
    alone, request = (flops.flops_reduction(model, SCHEDULE, 100, "evict", new_tokens=n) for n in (0, 50))
    assert 0 < request < alone
    assert flops.flops_reduction(model, SCHEDULE, 100, "keep", new_tokens=50) < request


def test_limits_order_and_bytes():
    model = tiny_llama(torch.float32)
    evict, keep = (flops.speedup_limit(model, SCHEDULE, 100, kv) for kv in ("evict", "keep"))
    assert evict > keep > 1 and flops.speedup_limit(model, Schedule.uniform(BLOCKS, 0.0), 100, "keep") == 1
    assert flops.flops_reduction(model, SCHEDULE, 100, "evict") == pytest.approx(1 - 1 / evict)
    pruner = TokenPruner(StaticRouter(), SCHEDULE, kv="evict")
    with torch.no_grad(), pruner(model):
        cache = model(torch.randint(3, 64, (1, 100)), use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 4
    assert held == flops.cached_bytes(model, SCHEDULE, 100, "evict")
    assert flops.cached_bytes(model, SCHEDULE, 100, "keep") == flops.cached_bytes(
        model, Schedule.uniform(BLOCKS, 0.0), 100, "evict"
    )


def test_a_mode_per_block_is_counted_by_hand():
    """Width 32, MLP 64, 4 heads of 8, 2 key heads, 64 words; 20 tokens, 10 of them kept where a block is pruned."""
    model, modes = tiny_llama(torch.float32), ("evict", "keep", "evict", "keep")
    schedule = Schedule([0.0, 0.5, 0.5, 0.5], modes)
    keys_values, attention, mlp, pair = 2 * 32 * 32, 2 * 2 * 32 * 32, 2 * 3 * 32 * 64, 2 * 4 * 16
    token, head = keys_values + attention + mlp, 2 * 32 * 64
    dense = 20 * token + pair * 210
    evict = 10 * token + pair * 55
    keep = 20 * keys_values + 10 * (attention + mlp) + pair * 110
    assert flops.prompt_flops(flops.block_costs(model), schedule, 20, modes, head) == dense + evict + 2 * keep + head
    saved = 1 - (dense + evict + 2 * keep + head) / (4 * dense + head)
    assert flops.flops_reduction(model, schedule, 20, modes) == pytest.approx(saved)
    assert flops.stored_tokens(schedule, 20, modes) == [20, 20, 10, 20]
    assert flops.cached_bytes(model, schedule, 20, modes) == 70 * 2 * 16 * 4
    pruner = TokenPruner(StaticRouter(), schedule)
    with torch.no_grad(), pruner(model):
        cache = model(torch.randint(3, 64, (1, 20)), use_cache=True).past_key_values
    assert sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 4 == 70 * 2 * 16 * 4
    trace = pruner.trace.routed
    assert row_costs(model, pruner, trace).kv_bytes == [70 * 2 * 16 * 4]
    kept = [mask[0].nonzero().flatten() for mask in trace.keep]
    pairs = [210, (kept[1] + 1).sum().item(), 55, (kept[3] + 1).sum().item()]
    linear = 20 * token + 10 * token + 2 * (20 * keys_values + 10 * (attention + mlp))
    assert flops.realised_flops(model, trace, modes)[1] == linear + pair * sum(pairs) + head


def test_bytes_read_to_decode_a_token():
    model = tiny_llama(torch.float32)
    costs_, stored, skipped = flops.block_costs(model), [50, 40, 30, 20], [False, True, False, True]
    head, blocks = 4 * 32 * 64, [sum(p.nbytes for p in block.parameters()) for block in find_blocks(model)]
    computed = head + sum(blocks[i] + stored[i] * 2 * 2 * 8 * 4 for i in (0, 2))
    assert flops.decode_bytes(model, costs_, stored, skipped, "evict") == computed
    assert flops.decode_bytes(model, costs_, stored, skipped, "keep") == computed + 2 * 4 * (2 * 32 * 16)


# ---------------------------------------------------------------- realised


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_realised_limit_counts_the_pairs_one_by_one(kv):
    """Against explicit loops over rows, blocks and tokens, with padding."""
    model = tiny_llama(torch.float32)
    real = torch.ones(2, 12, dtype=torch.long)
    real[1, :5] = 0
    pruner = TokenPruner(StaticRouter(), SCHEDULE, kv=kv)
    with torch.no_grad(), pruner(model):
        model(torch.randint(3, 64, (2, 12)), attention_mask=real, use_cache=False)
    costs_ = flops.block_costs(model)
    dense = pruned = 2 * 2.0 * 32 * 64
    for row in range(2):
        n = int(real[row].sum())
        for cost, keep in zip(costs_, pruner.trace.keep):
            kept = [p for p, k in enumerate(keep[row, real[row].bool()]) if k]
            seen = [p + 1 if kv == "keep" else i + 1 for i, p in enumerate(kept)]
            dense += n * (cost.keys_values + cost.other) + n * (n + 1) / 2 * cost.pair
            pruned += (
                (n if kv == "keep" else len(kept)) * cost.keys_values + len(kept) * cost.other + sum(seen) * cost.pair
            )
    assert flops.realised_speedup_limit(model, pruner.trace, kv) == pytest.approx(dense / pruned, rel=1e-9)


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_realised_flops_of_parts_under_a_window(kv):
    """Two rows, one padded on the left; attention and MLP skip other tokens. Against masks of positions."""
    model, new = stock("mistral with a window"), 3
    generator = torch.Generator().manual_seed(3)
    real = torch.ones(2, 30, dtype=torch.bool)
    real[1, :7] = False
    attention, mlp = ([real & (torch.rand(2, 30, generator=generator) < 0.5) for _ in range(3)] for _ in range(2))
    trace = Trace(keep=[a & m for a, m in zip(attention, mlp)], real=real)
    trace.keep_attention, trace.keep_mlp = attention, mlp
    costs_, head = flops.block_costs(model), flops.head_flops(model)
    pruned = 2 * head * (1 + new)
    for block, cost in enumerate(costs_):
        for row in range(2):
            queries = attention[block][row].nonzero().flatten().tolist()
            keys = (real[row].nonzero().flatten().tolist()) if kv == "keep" else queries
            fed, n = int(mlp[block][row].sum()), int(real[row].sum())
            pairs = visible(queries, keys, 8) + costs.continued_pairs(n, len(keys), new, 8)
            pruned += len(keys) * cost.keys_values + len(queries) * cost.attention + fed * cost.mlp
            pruned += pairs * cost.pair + new * (cost.keys_values + cost.other)
    dense, found = flops.realised_flops(model, trace, kv, new)
    assert found == pytest.approx(pruned, rel=1e-9)
    whole = [flops.prompt_flops(costs_, Schedule.uniform(3, 0.0), n, "keep", head) for n in (30, 23)]
    after = [flops.continuation_flops(costs_, n, new, [n] * 3, head) for n in (30, 23)]
    assert dense == pytest.approx(sum(whole) + sum(after), rel=1e-9)
    assert flops.realised_speedup_limit(model, trace, kv, new) == pytest.approx(dense / found)


def test_realised_and_planned_limits_agree_under_evict():
    model = tiny_llama(torch.float32)
    pruner = TokenPruner(StaticRouter(), SCHEDULE, kv="evict")
    with torch.no_grad(), pruner(model):
        model(torch.randint(3, 64, (1, 50)), use_cache=False)
    for new in (0, 20):
        planned = flops.speedup_limit(model, SCHEDULE, 50, "evict", new_tokens=new)
        assert flops.realised_speedup_limit(model, pruner.trace, "evict", new) == pytest.approx(planned, rel=1e-9)


# ---------------------------------------------------------------- budgets

LLAMA, WINDOWED = tiny_llama(torch.float32), stock("gemma2")


def one_token(model, schedule, length, kv, parts):
    """Share of the dense FLOPs that one token more, or less, in every block makes."""
    costs_, head = flops.block_costs(model), flops.head_flops(model)
    dense = flops.prompt_flops(costs_, Schedule.uniform(len(costs_), 0.0), length, kv, head, parts)
    here = flops.prompt_flops(costs_, schedule, length, kv, head, parts)
    moved = [Schedule([min(1.0, max(0.0, s + d / length)) for s in schedule.sparsity]) for d in (-1, 1)]
    return max(abs(flops.prompt_flops(costs_, other, length, kv, head, parts) - here) for other in moved) / dense


@given(
    st.floats(0.0, 0.95), st.integers(16, 300), st.sampled_from(["evict", "keep"]), st.sampled_from([None, "ramp"]),
    st.sampled_from(["block", "attention", "mlp", "attention+mlp"]), st.sampled_from(["llama", "windowed"]),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_a_solved_budget_is_nearest(share, length, kv, shape, parts, family):
    """A share of what can be saved is asked for; what comes back is within one token in every block."""
    model = {"llama": LLAMA, "windowed": WINDOWED}[family]
    blocks = len(find_blocks(model))
    ramp = Schedule([block / blocks for block in range(blocks)]) if shape else None
    top = Schedule([float(s > 0) for s in ramp.sparsity] if ramp else [1.0] * blocks)
    wanted = share * flops.flops_reduction(model, top, length, kv, parts)
    found = solve_budget(model, wanted, length, kv, ramp, parts)
    missed = abs(flops.flops_reduction(model, found, length, kv, parts) - wanted)
    assert missed <= one_token(model, found, length, kv, parts) + 1e-12
    if ramp:
        assert found.sparsity[0] == 0.0 and list(found.sparsity) == sorted(found.sparsity)
    else:
        assert len(set(found.sparsity)) == 1


def test_a_reduction_that_was_made_is_found_again():
    for sparsity in (0.0, 0.25, 0.5):
        even = Schedule.uniform(BLOCKS, sparsity)
        found = solve_budget(LLAMA, flops.flops_reduction(LLAMA, even, 64, "keep"), 64, "keep")
        assert found.sparsity == pytest.approx(even.sparsity, abs=1e-9)
    assert solve_budget(LLAMA, 0.0, 64, "keep", Schedule([0.0] * BLOCKS)) == Schedule([0.0] * BLOCKS)


@pytest.mark.parametrize(
    ("reduction", "schedule"), [(0.99, None), (0.3, Schedule([0.0] * 4)), (0.6, SCHEDULE), (1.0, None), (-0.1, None)]
)
def test_a_reduction_out_of_reach_is_told(reduction, schedule):
    with pytest.raises(UserError) as refused:
        solve_budget(LLAMA, reduction, 64, "keep", schedule, "attention")
    assert len(str(refused.value).splitlines()) <= 3
    assert ("at most" in str(refused.value)) is (0 <= reduction < 1)


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("last", [0.0, 0.5])
def test_realised_flops_where_the_last_token_alone_is_read(kv, last):
    """Planned, counted in the trace, and executed: the same, with one token in the last block."""
    model, schedule = tiny_llama(torch.float32), Schedule([0.0, 0.5, 0.5, last])
    pruner, ids = TokenPruner(StaticRouter(), schedule, kv=kv), torch.randint(3, 64, (1, 40))
    with torch.no_grad(), pruner(model):
        model(ids)
        assert not pruner.trace.last_only
        model(ids, logits_to_keep=torch.tensor([-1]))
    assert pruner.trace.last_only
    _, whole = flops.realised_flops(model, pruner.trace, kv)
    _, found = flops.realised_flops(model, pruner.trace, kv, last_only=True)
    *_, cost = flops.block_costs(model)
    kept = int(pruner.trace.keep[-1].sum())
    assert found < whole - 0.9 * (kept - 1) * cost.other
    without, head = without_pairs(model), flops.head_flops(model)
    _, counted = flops.realised_flops(model, pruner.trace, kv, costs=without, last_only=True)
    assert counted == pytest.approx(flops.prompt_flops(without, schedule, 40, kv, head, last_only=True))
