"""Sensitivity by the short way (capture once, start above the dense blocks) equals the long way (full forwards)."""

import json

import lightning
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from ftp_lightning.evaluation.continuation import continuation_logits, kl_per_token
from ftp_lightning.lit.block_sensitivity import BlockSensitivity, Share
from ftp_lightning.pruning.blocks import find_blocks
from ftp_lightning.pruning.prefix import capture, first_needed_block, resume_from
from ftp_lightning.pruning.pruner import TokenPruner
from ftp_lightning.routing.dynamic import DynamicRouter
from ftp_lightning.routing.static import StaticRouter
from ftp_lightning.schedule import Schedule

torch.set_num_threads(1)
BLOCKS, PROMPT, CONTINUATION, LEVELS = 4, 16, 5, (0.3, 0.9)
IDS = torch.randint(3, 50, (6, PROMPT + CONTINUATION), generator=torch.Generator().manual_seed(1))
SHAPE = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=BLOCKS, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def gemma():
    """Sliding and full attention alternate; a window shorter than the text is refused, so it is longer here."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, sliding_window=64, attn_implementation="eager")).eval()


def dynamic_router():
    torch.manual_seed(7)
    return DynamicRouter()


ROUTERS = {"static": StaticRouter(), "dynamic": dynamic_router()}


def maker(router, kv):
    return lambda schedule: TokenPruner(ROUTERS[router], schedule, kv=kv)


def alone(block, sparsity):
    return Schedule([sparsity if b == block else 0.0 for b in range(BLOCKS)])


def batches(size):
    return [{"input_ids": rows, "prompt_tokens": PROMPT} for rows in IDS.split(size)]


def predict(system, size=2):
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.predict(system, torch.utils.data.DataLoader(batches(size), batch_size=None))
    return system.summary()


@torch.no_grad()
def slow_kl(model, pruner, ids=IDS):
    teacher = continuation_logits(model, ids, PROMPT).log_softmax(-1)
    with pruner(model):
        return kl_per_token(teacher, continuation_logits(model, ids, PROMPT)).mean().item()


@pytest.mark.parametrize(
    ("build", "kv"),
    [(llama, "evict"), (llama, "keep"), (gemma, "evict"), (gemma, "keep")],
)
@pytest.mark.parametrize("router", ROUTERS)
def test_the_short_way_equals_the_long_way(build, router, kv):
    model, make = build(), maker(router, kv)
    slow = [[slow_kl(model, make(alone(block, level))) for level in LEVELS] for block in range(BLOCKS)]
    kl = predict(BlockSensitivity(model, make, BLOCKS, LEVELS))["kl"]
    assert torch.allclose(torch.tensor(kl), torch.tensor(slow), atol=1e-5)
    assert max(max(row) for row in slow) > 0.05  # far above the tolerance


@torch.no_grad()
def slow_cosines(model):
    states = model(IDS[:, :PROMPT], output_hidden_states=True).hidden_states
    last = []
    handle = find_blocks(model)[-1].register_forward_hook(lambda module, args, output: last.append(output))
    model(IDS[:, :PROMPT])
    handle.remove()
    states = [*states[:-1], last[0]]  # the last of HF's list is normed already
    return torch.stack([torch.cosine_similarity(a, b, dim=-1) for a, b in zip(states, states[1:])])


def test_influence_and_redundancy_are_those_of_the_prompt():
    model = llama()
    summary = predict(BlockSensitivity(model, maker("static", "keep"), BLOCKS, LEVELS, thresholds=(0.5, 0.8)))
    cosine = slow_cosines(model)
    assert summary["block_influence"] == pytest.approx((1 - cosine.mean((1, 2))).tolist(), abs=1e-6)
    for threshold in (0.5, 0.8):
        expected = (cosine > threshold).double().mean((1, 2)).tolist()
        assert summary["redundancy"][str(threshold)] == pytest.approx(expected, abs=1e-12)
    assert summary["tokens"] == {"prompt": 6 * PROMPT, "continuation": 6 * CONTINUATION}


def test_batches_of_unequal_size_weigh_by_tokens():
    by_two, by_four = (predict(BlockSensitivity(llama(), maker("static", "evict"), BLOCKS, LEVELS), n) for n in (2, 4))
    assert torch.allclose(torch.tensor(by_two["kl"]), torch.tensor(by_four["kl"]), atol=1e-5)
    assert json.loads(json.dumps(by_two)) == by_two


def test_test_and_predict_measure_the_same():
    system = BlockSensitivity(llama(), maker("static", "evict"), BLOCKS, LEVELS)
    for index, batch in enumerate(batches(2)):
        system.test_step(batch, index)
    assert system.summary() == predict(BlockSensitivity(llama(), maker("static", "evict"), BLOCKS, LEVELS))


def test_each_dense_block_runs_once_per_batch():
    """Calls of each MLP: 2 passes (prompt, continuation) x (1 dense + levels x pruned blocks up to it)."""
    model = llama()
    calls = [0] * BLOCKS
    for index, block in enumerate(find_blocks(model)):
        block.mlp.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    predict(BlockSensitivity(model, maker("static", "evict"), BLOCKS, LEVELS), size=len(IDS))
    assert calls == [2 * (1 + len(LEVELS) * (block + 1)) for block in range(BLOCKS)]


@torch.no_grad()
def test_resuming_a_dense_model_anywhere_gives_the_same_bits_and_leaves_no_trace():
    model = llama()
    with capture(model) as states:
        dense = continuation_logits(model, IDS, PROMPT)
    for block in range(BLOCKS + 1):
        with resume_from(model, block, states):
            assert torch.equal(continuation_logits(model, IDS, PROMPT), dense)
    assert not any("forward" in block.__dict__ or block._forward_pre_hooks for block in find_blocks(model))
    assert torch.equal(continuation_logits(model, IDS, PROMPT), dense)


@torch.no_grad()
def test_what_was_not_captured_is_refused():
    model = llama()
    with capture(model) as states:
        continuation_logits(model, IDS, PROMPT)
    with resume_from(model, 2, states):
        with pytest.raises(ValueError, match="not captured"):
            model(torch.cat([IDS, IDS], dim=1))
        with pytest.raises(ValueError, match="needs a key-value cache"):
            model(IDS, use_cache=False)


def test_a_router_of_attention_needs_the_last_block_that_sees_everything():
    assert [first_needed_block(llama(), block, True) for block in range(4)] == [0, 0, 1, 2]
    assert [first_needed_block(llama(), block, False) for block in range(4)] == [0, 1, 2, 3]
    assert [first_needed_block(gemma(), block, True) for block in range(4)] == [0, 0, 1, 1]
    assert [first_needed_block(llama(), block, True, one_pass=True) for block in range(4)] == [0, 0, 0, 0]


def test_processes_add_up():
    """What `dist_reduce_fx="sum"` does to two processes' states gives the share of all."""
    a, b, both = Share(2), Share(2), Share(2)
    for share, total, count in [(a, [1.0, 2.0], 4), (b, [3.0, 0.5], 8), (both, [1.0, 2.0], 4), (both, [3.0, 0.5], 8)]:
        share.update(torch.tensor(total, dtype=torch.float64), count)
    assert a._reductions["total"] is b._reductions["count"]
    merged = (a.total + b.total) / (a.count + b.count)
    assert torch.equal(both.compute(), merged)


@pytest.mark.parametrize("levels", [(), (0.0, 0.5), (0.5, 0.3), (0.5, 1.2)])
def test_impossible_levels_are_refused(levels):
    with pytest.raises(ValueError, match="levels must|must be in"):
        BlockSensitivity(llama(), maker("static", "evict"), BLOCKS, levels)
