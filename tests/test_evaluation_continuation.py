"""Continuation scores: equal to the plain forward where nothing is pruned, causal where something is."""

import pytest
import torch
from families import family
from tiny import random_llama
from transformers import LlamaForCausalLM

from ftp_lightning.costs.flops import realised_flops
from ftp_lightning.data.rows import Row, Rows
from ftp_lightning.evaluation.continuation import (
    continuation_logits,
    evaluate_rows,
    kl_per_token,
    nll_per_token,
    noise_floor,
    sequence_logits,
    teacher_logprobs,
)
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import make_router
from ftp_lightning.routing.random import RandomRouter
from ftp_lightning.routing.static import StaticRouter
from ftp_lightning.schedule import Schedule

PROMPT, CONTINUATION = 12, 5


@pytest.fixture(scope="module")
def model():
    return random_llama(48, num_key_value_heads=2, initializer_range=0.2)


@pytest.fixture
def windows():
    ids = torch.randint(48, (5, PROMPT + CONTINUATION), generator=torch.Generator().manual_seed(1))
    return Rows.even(ids, PROMPT, ["plain"] * 5, [0, 0, 1, 1, 2])


def half(router=None):
    return TokenPruner(router or StaticRouter(), Schedule([0.0, 0.5, 0.75]))


@pytest.mark.parametrize("logits_of", [continuation_logits, sequence_logits])
@pytest.mark.parametrize("prompt_tokens", [1, PROMPT, PROMPT + CONTINUATION - 1])
def test_dense_logits_are_a_slice_of_the_full_forward(model, windows, logits_of, prompt_tokens):
    with torch.no_grad():
        full = model(windows.input_ids).logits[:, prompt_tokens - 1 : -1]
        torch.testing.assert_close(logits_of(model, windows.input_ids, prompt_tokens), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("logits_of", [continuation_logits, sequence_logits])
@pytest.mark.parametrize("prompt_tokens", [0, PROMPT + CONTINUATION])
def test_prompt_must_leave_a_continuation(model, windows, logits_of, prompt_tokens):
    with pytest.raises(ValueError, match=r"prompt_tokens is \d+, must be in \[1, 16\]"):
        logits_of(model, windows.input_ids, prompt_tokens)


def test_half_precision_logits_come_back_in_float32(model, windows):
    small = LlamaForCausalLM(model.config).to(torch.bfloat16)
    assert continuation_logits(small, windows.input_ids, PROMPT).dtype == torch.float32


def test_pruned_continuation_is_causal_and_sequence_is_not(model, windows):
    changed = windows.input_ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 48
    longer = torch.cat([windows.input_ids, windows.input_ids[:, :8]], dim=1)
    with torch.no_grad(), half()(model):
        before = continuation_logits(model, windows.input_ids, PROMPT)
        assert torch.equal(before, continuation_logits(model, changed, PROMPT))
        after = continuation_logits(model, longer, PROMPT)[:, :CONTINUATION]
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
        moved = sequence_logits(model, longer, PROMPT)[:, :CONTINUATION] - sequence_logits(
            model, windows.input_ids, PROMPT
        )
    assert moved.abs().max() > 1e-2  # what follows decided which tokens were computed


def test_kl_and_nll_by_hand():
    teacher = torch.tensor([[[0.5, 0.5]]]).log()
    logits = torch.tensor([[[0.25, 0.75]]]).log() + 3.0  # logits are free to shift
    expected = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    torch.testing.assert_close(kl_per_token(teacher, logits), expected.view(1, 1))
    torch.testing.assert_close(nll_per_token(logits, torch.tensor([[0]])), torch.tensor([[4.0]]).log())
    assert kl_per_token(teacher, teacher).item() == 0.0


@pytest.mark.parametrize("mode", ["prompt", "sequence"])
def test_scores_equal_their_definitions(model, windows, mode):
    pruner = half()
    scores = evaluate_rows(model, windows, pruner, mode=mode, batch_size=2)
    with torch.no_grad():
        dense = model(windows.input_ids).logits[:, PROMPT - 1 : -1]
        with pruner(model):
            pruned = {"prompt": continuation_logits, "sequence": sequence_logits}[mode](
                model, windows.input_ids, PROMPT
            )
    kl = torch.nn.functional.kl_div(pruned.log_softmax(-1), dense.softmax(-1), reduction="none").sum(-1)
    nll = torch.nn.functional.cross_entropy(pruned.mT, windows.input_ids[:, PROMPT:], reduction="none")
    assert scores.kl_mean == pytest.approx(kl.mean().item(), rel=1e-3) and scores.kl_mean > 1e-3
    assert scores.kl_p99 == pytest.approx(kl.flatten().quantile(0.99).item(), rel=1e-3)
    assert scores.top1_agreement == pytest.approx((dense.argmax(-1) == pruned.argmax(-1)).float().mean().item())
    assert scores.ppl == pytest.approx(nll.mean().exp().item(), rel=1e-4)
    assert scores.kl_rows == pytest.approx(kl.mean(1).tolist(), rel=1e-3)
    assert scores.nll_rows == pytest.approx(nll.mean(1).tolist(), rel=1e-4)
    tokens = PROMPT if mode == "prompt" else PROMPT + CONTINUATION
    assert scores.sparsity == pytest.approx([0.0, round(0.5 * tokens) / tokens, round(0.75 * tokens) / tokens])
    assert scores.mean_sparsity == pytest.approx(sum(scores.sparsity) / 3)


@pytest.mark.parametrize("router", [StaticRouter(), RandomRouter(seed=3)])
def test_batch_size_and_a_shared_teacher_change_nothing(model, windows, router):
    alone = evaluate_rows(model, windows, half(router), batch_size=1)
    teacher = teacher_logprobs(model, windows, batch_size=4)
    together = evaluate_rows(model, windows, half(router), batch_size=5, teacher=teacher)
    assert together.kl_rows == pytest.approx(alone.kl_rows, abs=1e-5)
    assert together.nll_rows == pytest.approx(alone.nll_rows, abs=1e-4)
    assert together.sparsity == pytest.approx(alone.sparsity)


def test_the_model_is_dense_again_afterwards(model, windows):
    with torch.no_grad():
        before = model(windows.input_ids).logits
        evaluate_rows(model, windows, half())
        assert torch.equal(before, model(windows.input_ids).logits)


def test_noise_floor_is_tiny_and_leaves_the_weights_alone(model, windows):
    before = {name: p.clone() for name, p in model.named_parameters()}
    floor = noise_floor(model, windows, batch_size=4)
    rough = noise_floor(model, windows, batch_size=4, dtype=torch.bfloat16)
    assert 0.0 < floor.kl_mean < 1e-6 and floor.top1_agreement == 1.0 and floor.sparsity == []
    assert rough.kl_mean > 100 * floor.kl_mean
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in model.named_parameters())


def test_noise_floor_takes_a_shared_teacher_and_half_precision(model, windows):
    shared = noise_floor(model, windows, batch_size=4, teacher=teacher_logprobs(model, windows, batch_size=4))
    assert shared.kl_mean == pytest.approx(noise_floor(model, windows, batch_size=4).kl_mean, rel=1e-6)
    small = LlamaForCausalLM(model.config).to(torch.bfloat16)
    assert noise_floor(small, windows, batch_size=4).kl_mean > 0.0


def test_a_noise_floor_that_fails_puts_the_attention_back(model, windows, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no memory")

    teacher = teacher_logprobs(model, windows)
    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        noise_floor(model, windows, teacher=teacher)
    assert model.config._attn_implementation == "sdpa"


def test_wrong_requests_are_refused(model, windows):
    with pytest.raises(ValueError, match="mode is 'both'"):
        evaluate_rows(model, windows, mode="both")
    with pytest.raises(ValueError, match="teacher has 4 rows of other lengths"):
        evaluate_rows(model, windows, teacher=torch.zeros(4, CONTINUATION, 48))
    with pytest.raises(ValueError, match="no rows"):
        evaluate_rows(model, windows.subset([]))
    with pytest.raises(ValueError, match="no continuation to evaluate"):
        evaluate_rows(model, windows.prompts())


LENGTHS = [(9, 4), (4, 1), (12, 5), (9, 4), (6, 5), (12, 2)]
"""(prompt, continuation) tokens: some rows alike, none in order."""


@pytest.fixture(scope="module")
def ragged():
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(48, (p + c,), generator=generator).tolist() for p, c in LENGTHS]
    return Rows([Row(row[:p], row[p:], "chat", i) for i, (row, (p, c)) in enumerate(zip(ids, LENGTHS))])


def attention_router():
    return make_router("untrained", 3, hidden_size=1, seed=0)


PRUNERS = {
    "dense": lambda: None,
    "static evict": lambda: TokenPruner(StaticRouter(), Schedule([0.0, 0.5, 0.75]), kv="evict"),
    "static keep": lambda: TokenPruner(StaticRouter(), Schedule([0.0, 0.5, 0.75]), kv="keep"),
    "attention evict": lambda: TokenPruner(attention_router(), Schedule([0.0, 0.5, 0.75]), kv="evict", window=4),
    "attention keep": lambda: TokenPruner(attention_router(), Schedule([0.0, 0.5, 0.75]), kv="keep", window=4),
    "threshold": lambda: TokenPruner(StaticRouter(), Schedule([0.0, 0.5, 0.75]), kv="evict", choice="threshold"),
}


@pytest.mark.parametrize("mode", ["prompt", "sequence"])
@pytest.mark.parametrize("name", PRUNERS)
def test_a_row_among_others_is_what_it_is_alone(model, ragged, name, mode):
    together = evaluate_rows(model, ragged, PRUNERS[name](), mode, 4, teacher_logprobs(model, ragged, 3))
    alone = [evaluate_rows(model, ragged.subset([i]), PRUNERS[name](), mode) for i in range(len(ragged))]
    for column in ("kl_rows", "nll_rows", "dense_nll_rows", "sparsity_rows"):
        expected = [value for one in alone for value in getattr(one, column)]
        assert getattr(together, column) == pytest.approx(expected, abs=1e-5)
    for column in ("first_rows", "agreed_rows", "right_rows", "prompt_tokens", "continuation_tokens", "documents"):
        assert getattr(together, column) == [value for one in alone for value in getattr(one, column)]
    tokens = [c for _, c in LENGTHS]
    by_token = sum(c * kl for c, kl in zip(tokens, together.kl_rows)) / sum(tokens)
    assert together.kl_mean == pytest.approx(by_token, abs=1e-9)
    routed = [p + (mode == "sequence") * c for p, c in LENGTHS]
    if name == "dense":
        assert together.sparsity == together.sparsity_rows == [] and together.costs is None
        return
    weighted = sum(n * s for n, s in zip(routed, together.sparsity_rows)) / sum(routed)
    assert together.mean_sparsity == pytest.approx(weighted, abs=1e-6) and weighted > 0.2


@pytest.mark.parametrize("name", ["static evict", "attention keep", "threshold"])
def test_costs_are_those_of_all_batches(model, ragged, name):
    pruner, dense, pruned, stored = PRUNERS[name](), [], [], []
    scores = evaluate_rows(model, ragged, pruner, batch_size=2)
    for row in ragged.rows:
        with torch.no_grad(), pruner(model):
            cache = model(torch.tensor([row.prompt]), use_cache=True).past_key_values
        found = realised_flops(model, pruner.trace.prompt, pruner.kv)
        dense.append(found[0])
        pruned.append(found[1])
        stored.append(sum(held.nbytes for layer in cache.layers for held in (layer.keys, layer.values)))
    assert scores.costs.dense_flops == pytest.approx(dense) and scores.costs.flops == pytest.approx(pruned)
    assert scores.costs.kv_bytes == pytest.approx(stored)
    assert scores.flops_cut == pytest.approx(1 - sum(pruned) / sum(dense))
    last = evaluate_rows(model, ragged.subset(ragged.order[-2:]), pruner)
    assert abs(last.flops_cut - scores.flops_cut) > 1e-3  # the last batch alone says something else


def test_items_have_one_record_per_row(model, ragged):
    scores = evaluate_rows(model, ragged, half())
    items = scores.items()
    assert len(items) == len(ragged) and [item["kl"] for item in items] == scores.kl_rows
    assert {"document", "kind", "prompt_tokens", "first", "agreed", "right", "sparsity", "flops", "kv_bytes"} <= set(
        items[0]
    )
    assert "flops" not in evaluate_rows(model, ragged).items()[0]


def test_the_noise_floor_of_rows_is_that_of_each_alone(model, ragged):
    floor = noise_floor(model, ragged, batch_size=4)
    alone = [noise_floor(model, ragged.subset([i])).kl_mean for i in range(len(ragged))]
    assert floor.kl_rows == pytest.approx(alone, abs=1e-9) and max(floor.kl_rows) < 1e-6


@pytest.mark.parametrize(("own", "other"), [("sdpa", "eager"), ("eager", "sdpa")])
def test_the_noise_floor_runs_another_attention_kernel(windows, own, other):
    model = random_llama(48, num_key_value_heads=2, attn_implementation=own)
    ran = []
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda module, _: ran.append(module.config._attn_implementation))
    noise_floor(model, windows, batch_size=5)
    assert list(dict.fromkeys(ran)) == [own, other] and model.config._attn_implementation == own


@pytest.mark.parametrize("kv", ["keep", "evict"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "mistral_sliding", "gemma3"])
def test_of_other_families_a_row_among_others_is_what_it_is_alone(ragged, name, kv):
    """Learned positions, an offset of positions, sliding windows."""
    other, pruner = family(name), TokenPruner(StaticRouter(), Schedule([0.0, 0.5, 0.75, 0.5]), kv=kv)
    together = evaluate_rows(other, ragged, pruner, batch_size=4)
    alone = [evaluate_rows(other, ragged.subset([i]), pruner) for i in range(len(ragged))]
    for column in ("kl_rows", "nll_rows", "dense_nll_rows"):
        expected = [value for one in alone for value in getattr(one, column)]
        assert getattr(together, column) == pytest.approx(expected, abs=1e-6)
