"""Sensitivity by the short way (capture once, start above the dense blocks) equals the long way (full forwards)."""

import json
import math

import lightning
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from ftp_lightning.data.rows import Row, Rows
from ftp_lightning.evaluation.continuation import continuation_logits, kl_per_token, nll_per_token
from ftp_lightning.evaluation.redundancy import pooled_jaccard
from ftp_lightning.lit.block_sensitivity import BlockSensitivity, Share
from ftp_lightning.processes import launch
from ftp_lightning.pruning.family import find_blocks
from ftp_lightning.pruning.pruner import TokenPruner
from ftp_lightning.routing.base import Needs
from ftp_lightning.routing.dynamic import DynamicRouter
from ftp_lightning.routing.static import StaticRouter
from ftp_lightning.schedule import Schedule
from ftp_lightning.training.resume import capture, first_needed_block, resume_from

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


def measuring(model, make, *args, **kwargs):
    return BlockSensitivity(model, {"only": make}, BLOCKS, LEVELS, *args, prompt_tokens=PROMPT, **kwargs)


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
    kl = predict(measuring(model, make))["kl"]
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
    summary = predict(measuring(model, maker("static", "keep"), thresholds=(0.5, 0.8)))
    cosine = slow_cosines(model)
    assert summary["block_influence"] == pytest.approx((1 - cosine.mean((1, 2))).tolist(), abs=1e-6)
    for threshold in (0.5, 0.8):
        expected = (cosine > threshold).double().mean((1, 2)).tolist()
        assert summary["redundancy"][str(threshold)] == pytest.approx(expected, abs=1e-12)
        counts = (cosine > threshold).double().sum(1)
        jaccard = pooled_jaccard(counts, 6).tolist()
        measured = summary["position"][str(threshold)]["jaccard"]
        assert [x is None for x in measured] == [math.isnan(x) for x in jaccard]
        assert measured == pytest.approx([None if math.isnan(x) else x for x in jaccard])
    assert any(0 < x < 1 for x in measured if x is not None)
    assert summary["tokens"] == {"prompt": 6 * PROMPT, "continuation": 6 * CONTINUATION}


def gated_nll(model, ids, gates):
    """NLL of each row, block l adding gates[l] (B, P) times its update to the prompt; out of the blocks' own code."""
    handles = []
    for index, block in enumerate(find_blocks(model)):

        def gate(module, args, output, index=index):
            if output.shape[1] == PROMPT:  # the prompt's pass
                return args[0] + gates[index][..., None] * (output - args[0])

        handles.append(block.register_forward_hook(gate))
    nll = nll_per_token(continuation_logits(model, ids, PROMPT), ids[:, PROMPT:]).mean(1)
    for handle in handles:
        handle.remove()
    return nll


@pytest.mark.parametrize("build", [llama, gemma])
def test_the_gradient_is_that_of_a_gate_on_every_update(build):
    model = build()
    gates = torch.ones(BLOCKS, len(IDS), PROMPT, requires_grad=True)
    (slopes,) = torch.autograd.grad(gated_nll(model, IDS, gates).sum(), gates)
    found = predict(measuring(model, maker("static", "keep")))["gradient"]
    assert found == pytest.approx(slopes.abs().mean((1, 2)).tolist(), rel=1e-4)
    assert min(found) > 1e-4  # also in the last block, whose last prompt token is read


@torch.no_grad()
def test_the_gradient_is_the_slope_of_skipping_one_token():
    """Half-closing one gate by a little, both ways; norms are computed in float32, so not too little."""
    model, change = llama().double(), 1e-2
    system = measuring(model, maker("static", "keep"))
    predict(system)
    slopes = torch.zeros(BLOCKS, dtype=torch.float64)
    for block in range(BLOCKS):
        for position in range(PROMPT):
            losses = []
            for sign in (1, -1):
                gates = torch.ones(BLOCKS, len(IDS), PROMPT, dtype=torch.float64)
                gates[block, :, position] += sign * change
                losses.append(gated_nll(model, IDS, gates))
            slopes[block] += ((losses[0] - losses[1]) / (2 * change)).abs().sum()
    assert system.summary()["gradient"] == pytest.approx((slopes / IDS[:, :PROMPT].numel()).tolist(), rel=0.01)


def test_the_gradient_leaves_weights_as_they_were_and_can_be_left_out():
    model = llama()
    next(model.parameters()).requires_grad_(False)
    before = [weight.requires_grad for weight in model.parameters()]
    with_it = predict(measuring(model, maker("static", "keep")))
    assert [weight.requires_grad for weight in model.parameters()] == before
    assert all(weight.grad is None for weight in model.parameters())
    assert not find_blocks(model)[0]._forward_pre_hooks
    without = predict(measuring(model, maker("static", "keep"), gradient=False))
    assert "gradient" not in without and with_it.pop("gradient")
    assert flat(without["kl"]) == pytest.approx(flat(with_it["kl"]), abs=1e-6)
    assert without["redundancy"] == with_it["redundancy"]


def test_several_kv_modes_in_one_run_are_those_of_several_runs():
    makers = {kv: maker("static", kv) for kv in ("keep", "evict")}
    both = predict(BlockSensitivity(llama(), makers, BLOCKS, LEVELS, prompt_tokens=PROMPT))
    each = {kv: predict(measuring(llama(), make))["kl"] for kv, make in makers.items()}
    assert both["kl_by_kv"] == each and both["kl"] == each["keep"] != each["evict"]
    assert max(each["keep"][-1]) < 1e-6 < min(each["evict"][-1])  # nobody reads the last block's prompt under keep


def test_prompts_of_another_length_are_refused():
    system = BlockSensitivity(llama(), {"only": maker("static", "keep")}, BLOCKS, LEVELS, prompt_tokens=PROMPT - 1)
    with pytest.raises(ValueError, match="prompts that are not of 15 tokens"):
        predict(system)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one():
    """Each measures its share of the windows; both tell the same, what all measured."""
    (first, second), expected = launch(2, torch.device("cpu"), share_of_the_windows), measured(IDS.split(2)).summary()
    assert first == second
    assert flat(first) == pytest.approx(flat(expected), rel=1e-6)
    assert flat(first) != pytest.approx(flat(measured(IDS.split(2)[:1]).summary()), rel=1e-3)


def share_of_the_windows(processes, device):
    part = measured([IDS.split(2)[processes.rank]] if processes.rank == 0 else IDS.split(2)[1:])
    return processes.gather(part.summary())


def measured(parts):
    system = measuring(llama(), maker("static", "evict"))
    for index, rows in enumerate(parts):
        system.test_step({"input_ids": rows, "prompt_tokens": PROMPT}, index)
    return system


def test_forward_tokens_are_those_of_the_blocks_that_ran():
    found = measured([IDS]).summary()["forward_tokens"]
    ran = sum(BLOCKS - block for block in range(BLOCKS)) / BLOCKS  # of one token, once per level
    assert found == {"dense": IDS.numel(), "gradient": IDS.numel(), "kl": round(len(LEVELS) * IDS.numel() * ran)}


def flat(value):
    """All numbers of a summary in order."""
    if isinstance(value, dict | list):
        return [x for item in (value.values() if isinstance(value, dict) else value) for x in flat(item)]
    return [-1.0 if value is None else value] if isinstance(value, int | float) else []


def test_batches_of_unequal_size_weigh_by_tokens():
    by_two, by_four = (predict(measuring(llama(), maker("static", "evict")), n) for n in (2, 4))
    assert torch.allclose(torch.tensor(by_two["kl"]), torch.tensor(by_four["kl"]), atol=1e-5)
    assert json.loads(json.dumps(by_two)) == by_two


def test_test_and_predict_measure_the_same():
    system = measuring(llama(), maker("static", "evict"))
    for index, batch in enumerate(batches(2)):
        system.test_step(batch, index)
    assert system.summary() == predict(measuring(llama(), maker("static", "evict")))


def test_each_dense_block_runs_once_per_batch():
    """Calls of each MLP: 2 passes (prompt, continuation) x (1 dense + levels x pruned blocks up to it)."""
    model = llama()
    calls = [0] * BLOCKS
    for index, block in enumerate(find_blocks(model)):
        block.mlp.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    predict(measuring(model, maker("static", "evict")), size=len(IDS))
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
        with pytest.raises(ValueError, match="were not captured"):
            model(IDS, use_cache=False)


def test_a_router_of_attention_needs_the_last_block_that_sees_everything():
    assert [first_needed_block(llama(), block, Needs(attention=True)) for block in range(4)] == [0, 0, 1, 2]
    assert [first_needed_block(llama(), block, Needs()) for block in range(4)] == [0, 1, 2, 3]
    assert [first_needed_block(gemma(), block, Needs(attention=True)) for block in range(4)] == [0, 0, 1, 1]
    assert [first_needed_block(llama(), block, Needs(attention=True, once="from block 0")) for block in range(4)] == [
        0,
        0,
        0,
        0,
    ]
    assert [first_needed_block(llama(), block, Needs(attention=True), 0) for block in range(4)] == [0, 0, 0, 0]


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
        BlockSensitivity(llama(), {"only": maker("static", "evict")}, BLOCKS, levels, prompt_tokens=PROMPT)


LENGTHS = ((16, 5), (6, 2), (11, 5), (6, 1), (9, 3))


def test_rows_of_any_length_are_what_they_are_alone():
    """Influence, redundancy and gradient weigh by prompt tokens, KL by continuation tokens; padding is nowhere."""
    rows = Rows([Row(row[:p], row[PROMPT : PROMPT + c]) for row, (p, c) in zip(IDS.tolist(), LENGTHS)])
    model, about = llama(), {"only": maker("static", "keep")}

    def summary(batches):
        system = BlockSensitivity(model, about, BLOCKS, LEVELS, prompt_tokens=None)
        for batch in batches:
            system._measure(batch)
        return system.summary()

    together = summary(batch for _, batch in rows.batches(3))
    alone = [summary([rows.batch([i])]) for i in range(5)]
    for name, part in (("block_influence", 0), ("gradient", 0), ("kl", 1)):
        weights = torch.tensor([lengths[part] for lengths in LENGTHS], dtype=torch.float64)
        each = torch.stack([torch.tensor(one[name], dtype=torch.float64).flatten() for one in alone])
        expected = (weights[:, None] * each).sum(0) / weights.sum()
        assert torch.tensor(together[name]).flatten().tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    shares = [[p * one["redundancy"]["0.8"][block] for (p, _), one in zip(LENGTHS, alone)] for block in range(BLOCKS)]
    assert together["redundancy"]["0.8"] == pytest.approx([sum(row) / 48 for row in shares])
    assert together["tokens"] == {"prompt": 48, "continuation": 16} and "position" not in together
    assert together["forward_tokens"]["dense"] == 64
