"""The engine against its slow twin, and the identities that define it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import run_row
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from ftp_lightning import DynamicRouter, FixedRouter, RandomRouter, Schedule, StaticRouter, TokenPruner
from ftp_lightning.errors import UserError
from ftp_lightning.pruning.decide import kept_tokens

BLOCKS = 4


def tiny_llama(dtype=torch.float64, attention="sdpa", seed=0):
    """Random weights large enough that a wrong mask shows."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.25,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


MODEL = tiny_llama()
TEXT = torch.randint(3, 64, (3, 24), generator=torch.Generator().manual_seed(1))
ROUTERS = {"static": StaticRouter, "random": RandomRouter, "dynamic": lambda: seeded(DynamicRouter)}


def seeded(make, seed=5):
    torch.manual_seed(seed)
    return make()


def prefill_and_continue(model, pruner, ids, prompt, **kwargs):
    """Logits of prompt and continuation as a user gets them, and the prompt's trace."""
    with torch.no_grad(), pruner(model):
        first = model(input_ids=ids[:, :prompt], use_cache=True, **kwargs)
        parts = [first.logits]
        if ids.shape[1] > prompt:
            parts.append(model(input_ids=ids[:, prompt:], past_key_values=first.past_key_values).logits)
    return torch.cat(parts, 1), pruner.trace.prompt


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kv", ["evict", "keep", ("evict", "keep", "keep", "evict")])
@pytest.mark.parametrize(("choice", "attention"), [("topk", "window"), ("threshold", "window"), ("topk", "exact")])
def test_gathered_equals_oracle(router, kv, choice, attention):
    pruner = TokenPruner(
        ROUTERS[router](), Schedule([0.0, 0.3, 0.6, 0.4]), kv=kv, choice=choice, attention=attention, window=5
    )
    logits, trace = prefill_and_continue(MODEL, pruner, TEXT, 18)
    for row in range(len(TEXT)):
        expected, keep = run_row(MODEL, pruner, TEXT[row], 18)
        assert all(torch.equal(k[row], e) for k, e in zip(trace.keep, keep))
        assert relative(logits[row], expected) < 1e-11


@settings(max_examples=40, deadline=None)
@given(
    sparsity=st.lists(st.floats(0, 1), min_size=BLOCKS, max_size=BLOCKS),
    kv=st.lists(st.sampled_from(["evict", "keep"]), min_size=BLOCKS, max_size=BLOCKS),
    router=st.sampled_from(sorted(ROUTERS)),
    attention=st.sampled_from(["window", "exact"]),
    window=st.integers(1, 30),
    tokens=st.integers(2, 24),
    prompt_share=st.floats(0.05, 1),
    seed=st.integers(0, 99),
)
def test_gathered_equals_oracle_property(sparsity, kv, router, attention, window, tokens, prompt_share, seed):
    ids = torch.randint(3, 64, (1, tokens), generator=torch.Generator().manual_seed(seed))
    prompt = max(1, round(tokens * prompt_share))
    pruner = TokenPruner(ROUTERS[router](), Schedule(sparsity), kv=kv, attention=attention, window=window)
    logits, trace = prefill_and_continue(MODEL, pruner, ids, prompt)
    expected, _ = run_row(MODEL, pruner, ids[0], prompt, keep=[k[0] for k in trace.keep])
    assert relative(logits[0], expected) < 1e-11


def test_float32_and_eager_equal_the_oracle_too():
    # Hugging Face's eager attention takes its softmax in float32 whatever the model's dtype
    for dtype, attention, tolerance in (
        (torch.float32, "sdpa", 1e-5),
        (torch.float64, "eager", 1e-5),
        (torch.float32, "eager", 1e-5),
    ):
        model = tiny_llama(dtype, attention)
        for kv in ("evict", "keep"):
            pruner = TokenPruner(StaticRouter(), Schedule([0.2, 0.5, 0.0, 0.5]), kv=kv)
            logits, _ = prefill_and_continue(model, pruner, TEXT, 18)
            expected = torch.stack([run_row(model, pruner, row, 18)[0] for row in TEXT])
            assert relative(logits, expected) < tolerance


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_row_decides_alone(kv, side, router):
    """Padded rows of different lengths give what each row gives by itself."""
    lengths = (24, 15, 9)
    pruner = TokenPruner(ROUTERS[router](), Schedule([0.1, 0.5, 0.7, 0.3]), kv=kv, window=4)
    ids, mask = torch.zeros(3, 24, dtype=torch.long), torch.zeros(3, 24, dtype=torch.long)
    places = [slice(0, n) if side == "right" else slice(24 - n, 24) for n in lengths]
    for row, place in enumerate(places):
        ids[row, place], mask[row, place] = TEXT[row, : lengths[row]], 1
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), pruner(MODEL):
        logits = MODEL(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits
        keep = pruner.trace.keep
        assert all(not k[mask == 0].any() for k in keep)
        for row, place in enumerate(places):
            alone = MODEL(input_ids=TEXT[row : row + 1, : lengths[row]], use_cache=False).logits
            assert all(torch.equal(k[row, place], a[0]) for k, a in zip(keep, pruner.trace.keep))
            assert relative(logits[row, place], alone[0]) < 1e-11


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_padded_prompt_then_continuation(kv):
    """Left padding, a cache, then several new tokens: as each row by itself."""
    pruner = TokenPruner(StaticRouter(), Schedule([0.4, 0.5, 0.3, 0.6]), kv=kv)
    lengths = (16, 11)
    ids, mask = torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, 16 - n :], mask[row, 16 - n :] = TEXT[row, :n], 1
    new, longer = TEXT[:2, 18:22], torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1)
    position = (longer.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), pruner(MODEL):
        cache = MODEL(input_ids=ids, attention_mask=mask, position_ids=position[:, :16], use_cache=True).past_key_values
        logits = MODEL(
            input_ids=new, attention_mask=longer, position_ids=position[:, 16:], past_key_values=cache
        ).logits
    for row, n in enumerate(lengths):
        alone, _ = prefill_and_continue(MODEL, pruner, torch.cat([TEXT[row, :n], new[row]])[None], n)
        assert relative(logits[row], alone[0, n:]) < 1e-11


@pytest.mark.parametrize("router", ROUTERS)
def test_schedule_zero_is_bit_equal_to_dense(router):
    model = tiny_llama(torch.float32)
    pruner = TokenPruner(ROUTERS[router](), Schedule.uniform(BLOCKS, 0.0))
    mask = torch.ones_like(TEXT)
    with torch.no_grad():
        dense = model(TEXT).logits
        text = model.generate(TEXT, attention_mask=mask, max_new_tokens=8, do_sample=False)
        with pruner(model):
            assert torch.equal(model(TEXT).logits, dense)
            assert torch.equal(model.generate(TEXT, attention_mask=mask, max_new_tokens=8, do_sample=False), text)
    assert pruner.trace.prompt.sparsity == [0.0] * BLOCKS


def test_keep_with_only_the_last_block_pruned_leaves_the_continuation_dense():
    pruner = TokenPruner(StaticRouter(), Schedule([0.0] * (BLOCKS - 1) + [1.0]), kv="keep")
    logits, trace = prefill_and_continue(MODEL, pruner, TEXT, 18)
    with torch.no_grad():
        dense = MODEL(TEXT).logits
    assert relative(logits[:, 17:], dense[:, 17:]) < 1e-12  # from the prompt's last token on
    assert relative(logits[:, :17], dense[:, :17]) > 1e-3  # and the prompt's own predictions were given up
    assert trace.keep[-1].sum(1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("router", ROUTERS)
def test_training_forward_equals_inference_forward(kv, router):
    """The masked executor decides and computes what prefill + cached continuation do."""
    pruner = TokenPruner(ROUTERS[router](), Schedule([0.2, 0.5, 0.7, 0.4]), kv=kv, window=6)
    logits, trace = prefill_and_continue(MODEL, pruner, TEXT, 18)
    with torch.no_grad(), pruner(MODEL), pruner.masked(18):
        masked = MODEL(TEXT, use_cache=False).logits
    assert all(torch.equal(m[:, :18], k) for m, k in zip(pruner.trace.keep, trace.keep))
    assert relative(masked, logits) < 1e-11


def test_training_forward_gives_every_routed_gate_a_gradient():
    model, router = tiny_llama(torch.float32), seeded(DynamicRouter)
    pruner = TokenPruner(router, Schedule([0.0, 0.5, 0.5, 0.5]), kv="keep")
    with pruner(model), pruner.masked(18):
        hidden = model.model(TEXT, use_cache=False).last_hidden_state
    probabilities = [d.probability for d in pruner.decisions]
    gradients = torch.autograd.grad(hidden[:, 17:].pow(2).sum(), probabilities)
    assert len(gradients) == 3
    # the last block's outputs are read by nobody but the last token: gates have no gradient there, all earlier ones
    # have but for the reserved tokens, which are computed whatever the router says. (Under `evict` a token that no
    # later block takes as a key has none either: nobody would have read it.)
    for gradient in gradients[:-1]:
        assert (gradient[:, 1:17] != 0).float().mean() > 0.9
        assert not gradient[:, [0, 17]].any()
    assert torch.equal(gradients[-1][:, :17], torch.zeros(3, 17))


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_later_continuation_token_moves_no_earlier_logit(kv, router):
    pruner = TokenPruner(ROUTERS[router](), Schedule([0.3, 0.5, 0.7, 0.4]), kv=kv)
    logits, _ = prefill_and_continue(MODEL, pruner, TEXT, 18)
    changed = TEXT.clone()
    changed[:, 21] = (changed[:, 21] + 7) % 60 + 3
    again, _ = prefill_and_continue(MODEL, pruner, changed, 18)
    assert torch.equal(logits[:, :21], again[:, :21])
    assert not torch.equal(logits[:, 21:], again[:, 21:])


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_chunk_equals_stepwise(kv):
    """Continuation tokens scored at once equal the same tokens one by one."""
    pruner = TokenPruner(seeded(DynamicRouter), Schedule([0.3, 0.5, 0.7, 0.4]), kv=kv)
    together, _ = prefill_and_continue(MODEL, pruner, TEXT, 18)
    with torch.no_grad(), pruner(MODEL):
        cache = MODEL(TEXT[:, :18], use_cache=True).past_key_values
        steps = [MODEL(TEXT[:, t : t + 1], past_key_values=cache).logits for t in range(18, 24)]
    assert relative(torch.cat(steps, 1), together[:, 18:]) < 1e-11


@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_generate_equals_stepwise_greedy(kv):
    model = tiny_llama(torch.float32)
    pruner = TokenPruner(StaticRouter(), Schedule([0.3, 0.5, 0.7, 0.4]), kv=kv)
    with torch.no_grad(), pruner(model):
        text = model.generate(
            TEXT, attention_mask=torch.ones_like(TEXT), max_new_tokens=6, min_new_tokens=6, do_sample=False
        )
        prompt = pruner.trace.prompt
        out = model(TEXT, use_cache=True)
        for t in range(6):
            token = out.logits[:, -1].clone()
            token[:, 2] = -torch.inf  # min_new_tokens forbids the end
            token = token.argmax(-1, keepdim=True)
            assert torch.equal(text[:, 24 + t], token[:, 0])
            out = model(token, past_key_values=out.past_key_values)
    assert prompt.keep[1].shape == TEXT.shape and prompt.keep[1].sum(1).tolist() == [12] * 3


def test_fixed_router_replays_a_trace():
    pruner = TokenPruner(RandomRouter(3), Schedule([0.3, 0.0, 0.7, 0.4]), kv="keep")
    logits, trace = prefill_and_continue(MODEL, pruner, TEXT, 18)
    replay = TokenPruner(FixedRouter(trace.keep), None, kv="keep")
    again, traced = prefill_and_continue(MODEL, replay, TEXT, 18)
    assert all(torch.equal(a, b) for a, b in zip(trace.keep, traced.keep)) and torch.equal(logits, again)
    with pytest.raises(ValueError, match="shape"), torch.no_grad(), replay(MODEL):
        MODEL(TEXT)
    assert "forward" not in MODEL.model.__dict__


@settings(max_examples=50, deadline=None)
@given(sparsity=st.floats(0, 1), tokens=st.integers(1, 24), name=st.sampled_from(sorted(ROUTERS)))
def test_topk_keeps_exactly_the_scheduled_number(sparsity, tokens, name):
    pruner = TokenPruner(ROUTERS[name](), Schedule.uniform(BLOCKS, sparsity))
    with torch.no_grad(), pruner(MODEL):
        MODEL(TEXT[:, :tokens], use_cache=False)
    expected = kept_tokens(tokens, sparsity, 2)
    assert all(k.sum(1).tolist() == [expected] * 3 for k in pruner.trace.keep)
    assert all(k[:, 0].all() and k[:, -1].all() for k in pruner.trace.keep)


def state_of(model):
    return {
        name: (
            sorted(k for k in m.__dict__ if not k.startswith("_parameters")),
            id(getattr(m, "config", None)),
            len(m._forward_hooks),
        )
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("fail", [False, True])
def test_detached_leaves_no_trace_also_after_an_exception(fail):
    model = tiny_llama(torch.float32)
    before, config = state_of(model), copy.deepcopy(model.config.to_dict())
    dense = model(TEXT).logits
    pruner = TokenPruner(DynamicRouter(), Schedule.uniform(BLOCKS, 0.5), kv="keep")
    try:
        with pruner(model):
            assert state_of(model) != before
            model(TEXT)
            if fail:
                model(torch.full((1, 4), 9999))  # no such token
    except IndexError:
        assert fail
    assert state_of(model) == before and model.config.to_dict() == config
    assert torch.equal(model(TEXT).logits, dense)


def test_misuse_is_refused_in_words():
    model, other = tiny_llama(torch.float32), tiny_llama(torch.float32, seed=1)
    pruner = TokenPruner(StaticRouter(), Schedule.uniform(BLOCKS, 0.5))
    pruner.attach(model)
    with pytest.raises(UserError, match="attached already"):
        pruner.attach(other)
    with pytest.raises(UserError, match="another pruner"):
        TokenPruner(StaticRouter(), Schedule.uniform(BLOCKS, 0.5)).attach(model)
    with pytest.raises(UserError, match="use_cache=False"):
        model.generate(TEXT, attention_mask=torch.ones_like(TEXT), use_cache=False, max_new_tokens=2)
    with pytest.raises(UserError, match="use_cache=False"):
        model.generate(TEXT, GenerationConfig(use_cache=False, max_new_tokens=2))
    with pytest.raises(UserError, match="token_healing"):
        model.generate(TEXT, attention_mask=torch.ones_like(TEXT), token_healing=True, max_new_tokens=2)
    with pytest.raises(UserError, match="assistant_early_exit"):
        model.generate(TEXT, attention_mask=torch.ones_like(TEXT), assistant_early_exit=2, max_new_tokens=2)
    with torch.no_grad():
        cache = model(TEXT, use_cache=True).past_key_values
    pruner.detach()
    with pytest.raises(UserError, match="filled by a TokenPruner"), torch.no_grad():
        model(TEXT[:, :2], past_key_values=cache)
    with pytest.raises(UserError, match="made for 3 blocks, the model has 4"):
        TokenPruner(StaticRouter(), Schedule.uniform(3, 0.5)).attach(model)
    for bad in (
        {"kv": "half"},
        {"decode": "sometimes"},
        {"skip": "magic"},
        {"attention": "all"},
        {"choice": "best"},
        {"window": 0},
    ):
        with pytest.raises(ValueError):
            TokenPruner(StaticRouter(), Schedule.uniform(BLOCKS, 0.5), **bad)


def test_a_deep_copy_runs_on_its_own_weights():
    model = tiny_llama(torch.float32)
    pruner = TokenPruner(StaticRouter(), Schedule.uniform(BLOCKS, 0.5))
    with torch.no_grad(), pruner(model):
        expected = model(TEXT).logits
        copied = copy.deepcopy(model)
        for p in model.parameters():
            p.zero_()
        assert torch.equal(copied(TEXT).logits, expected)


def test_save_pretrained_while_attached_stores_the_plain_model(tmp_path):
    model = tiny_llama(torch.float32)
    with TokenPruner(DynamicRouter(), Schedule.uniform(BLOCKS, 0.5))(model):
        model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(TEXT).logits, model(TEXT).logits)


@pytest.mark.parametrize("router", ["static", "dynamic"])
@pytest.mark.parametrize("kv", ["evict", "keep"])
def test_routed_chunk_on_a_filled_cache(kv, router):
    """`prompt()` routes a second turn: counts and reservation hold within the chunk; its kept tokens see the cache."""
    pruner = TokenPruner(ROUTERS[router](), Schedule([0.0, 0.5, 1.0, 0.5]), kv=kv)
    with torch.no_grad(), pruner(MODEL):
        cache = MODEL(TEXT[:, :10], use_cache=True).past_key_values
        first = pruner.trace.keep
        with pruner.prompt():
            logits = MODEL(TEXT[:, 10:20], past_key_values=cache).logits
        second = pruner.trace.keep
        after = MODEL(TEXT[:, 20:], past_key_values=cache).logits
    assert [k.sum(1).tolist()[0] for k in second] == [10, 5, 1, 5] and all(k[:, -1].all() for k in second)
    keep = [torch.cat([a, b], 1) for a, b in zip(first, second)]
    for row in range(3):
        expected, _ = run_row(MODEL, pruner, TEXT[row], 20, keep=[k[row] for k in keep])
        assert relative(logits[row, -1], expected[19]) < 1e-11 and relative(after[row], expected[20:]) < 1e-11


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("kept", [[3], [], [0, 9]])
def test_odd_decisions_equal_the_oracle(kv, kept):
    """A block that keeps one early token, none, or two: nothing later leaks in, and the cache goes on from there."""
    keep = [torch.ones(1, 10, dtype=torch.bool) for _ in range(BLOCKS)]
    keep[1] = torch.zeros(1, 10, dtype=torch.bool)
    keep[1][0, kept] = True
    pruner = TokenPruner(FixedRouter(keep), None, kv=kv)
    logits, _ = prefill_and_continue(MODEL, pruner, TEXT[:1, :14], 10)
    expected, _ = run_row(MODEL, pruner, TEXT[0, :14], 10, keep=[k[0] for k in keep])
    assert relative(logits[0], expected) < 1e-11


def test_attention_changed_while_attached_is_refused():
    model = tiny_llama(torch.float32)
    with torch.no_grad(), TokenPruner(StaticRouter(), Schedule.uniform(BLOCKS, 0.5))(model):
        model.set_attn_implementation("eager")
        with pytest.raises(UserError, match="was changed"):
            model(TEXT)


def test_scores_survive_float16():
    """Queries and keys whose product does not fit float16 still rank tokens."""
    model = tiny_llama(torch.float16)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 60
        layer.self_attn.k_proj.weight *= 60
    pruner = TokenPruner(seeded(DynamicRouter), Schedule([0.0, 0.5, 0.5, 0.5]))
    with torch.no_grad(), pruner(model):
        assert torch.isfinite(model(TEXT).logits).all()
