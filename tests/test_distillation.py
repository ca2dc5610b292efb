"""Distilled compensation: the loss and its gradient against a slow obvious twin, and what a training does."""

from dataclasses import replace

import pytest
import torch
from tiny import random_llama

from ftp_lightning import (
    AttentionScore,
    DynamicRouter,
    Schedule,
    StaticRouter,
    TokenPruner,
    UntrainedRouter,
    UserError,
    fit_compensation,
)
from ftp_lightning.data.rows import Row, Rows, scored_tokens
from ftp_lightning.evaluation.continuation import continuation_logits
from ftp_lightning.lit.distillation import Distillation, DistillationSettings, distil_compensation, fit_distillation
from ftp_lightning.lit.lessons import lessons
from ftp_lightning.losses import kl_rows
from ftp_lightning.training.compensation import balanced

SCHEDULE = Schedule([0.0, 0.0, 0.6, 0.8])


@pytest.fixture(scope="module")
def model():
    return random_llama(64, num_hidden_layers=4, initializer_range=0.15).requires_grad_(False)


def rows_of(lengths, seed=0, new=4):
    draw = torch.Generator().manual_seed(seed)
    return Rows(
        [Row(*(torch.randint(3, 64, (n,), generator=draw).tolist() for n in (length, new))) for length in lengths]
    )


EVEN, UNEVEN = rows_of([14] * 4), rows_of([9, 14, 12, 10], 1)
ROUTERS = {
    "static": (StaticRouter, "window"),
    "some blocks": (lambda: UntrainedRouter(("rank",)), AttentionScore(4, heads="max", blocks=(0, 2))),
    "latest attention": (lambda: UntrainedRouter(("rank",)), "window"),
    "trained": (DynamicRouter, "window"),
}


def pruner_of(model, router="static", kv="keep", rank=3, parts="block"):
    make, score = ROUTERS[router]
    torch.manual_seed(0)
    fitted = fit_compensation(model, EVEN, rank, parts="block" if parts == "block" else "block+attention+mlp")
    about = {"skip": "low-rank" if rank else "mean", "compensation": fitted, "parts": parts}
    return TokenPruner(make(), SCHEDULE, kv=kv, attention=score, **about)


CASES = [(router, kv, rows, "block") for router in ROUTERS for kv in ("keep", "evict") for rows in (EVEN, UNEVEN)]
CASES += [("static", "keep", UNEVEN, parts) for parts in ("mlp", "attention+mlp", ("mlp", "block", "mlp", "block"))]


@pytest.mark.parametrize("router,kv,rows,parts", CASES)
def test_loss_and_gradient_are_those_of_the_whole_forward(model, router, kv, rows, parts):
    """Nothing kept, nothing replayed: the dense and the pruned model run on everything, row by row."""
    pruner = pruner_of(model, router, kv, parts=parts)
    system = Distillation(model, pruner, lessons(model, pruner, rows, 4))
    [lesson] = system.teaching
    loss = system.kl(lesson)
    loss.sum().backward()
    start = balanced(pruner.compensation)
    free = {name: t.clone().requires_grad_() for name, t in start.tensors.items()}
    twin, expected = pruner.changed(compensation=replace(start, tensors=free)), []
    for number in rows.order:
        one = rows.batch([number])
        teacher = continuation_logits(model, **one)
        with twin(model):
            logits = continuation_logits(model, **one)
        expected.append(kl_rows(logits, teacher.log_softmax(-1).half().float(), scored_tokens(one)))
    expected = torch.cat(expected)
    expected.sum().backward()
    assert torch.allclose(loss, expected, rtol=1e-3, atol=1e-6)
    for name, found in system.maps.items():
        wanted = free[name.replace("/", ".")].grad
        if wanted is None:  # of a part that is not addressed
            assert found.grad is None or not found.grad.any()
            continue
        assert torch.allclose(found.grad, wanted[2:], rtol=1e-3, atol=1e-6 * wanted.abs().max().item() + 1e-7), name
        assert not wanted[:2].any()


def test_a_distilled_compensation_is_nearer_to_the_dense_model_and_touches_nothing_else(model):
    pruner, weights = pruner_of(model), {name: p.clone() for name, p in model.named_parameters()}
    told = []
    settings = DistillationSettings(epochs=6, accumulate=2, learning_rate=0.05)
    held_out = rows_of([12] * 3, 2)
    system = Distillation(model, pruner, lessons(model, pruner, EVEN), lessons(model, pruner, held_out), settings)
    found = fit_distillation(system, progress=lambda *about: told.append(about))
    assert told == [(epoch, 6) for epoch in range(1, 7)]
    assert [row["epoch"] for row in system.history] == list(range(7))
    assert system.history[-1]["kl"] < 0.8 * system.history[1]["kl"]
    assert system.best[0] == min(row["validation_kl"] for row in system.history)
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor[:2], pruner.compensation.tensors[name][:2]), "block that nothing skips"
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert "forward" not in vars(model.model)


def test_the_mean_update_is_distilled_too_and_no_epoch_gives_the_start(model):
    pruner = pruner_of(model, rank=0)
    found = distil_compensation(model, pruner, EVEN, settings=DistillationSettings(epochs=1))
    assert not torch.equal(found.tensors["block.bias"][2:], pruner.compensation.tensors["block.bias"][2:])
    same = distil_compensation(model, pruner, EVEN, settings=DistillationSettings(epochs=0))
    assert torch.equal(same.tensors["block.bias"], pruner.compensation.tensors["block.bias"])


def test_a_stopped_distillation_goes_on_to_the_same_result(model, tmp_path):
    pruner, settings = pruner_of(model), DistillationSettings(epochs=4, accumulate=2)

    def system():
        return Distillation(model, pruner, lessons(model, pruner, EVEN), lessons(model, pruner, UNEVEN), settings)

    def stop(epoch, epochs):
        if epoch == 2:
            raise RuntimeError("stop")

    whole = fit_distillation(system())
    with pytest.raises(RuntimeError, match="stop"):
        fit_distillation(system(), tmp_path, stop)
    again = system()
    found = fit_distillation(again, tmp_path)
    other = system()
    fit_distillation(other, tmp_path, fingerprint="of something else")
    assert len(other.history) == 5
    assert len(again.history) == 5 and all(torch.equal(t, whole.tensors[name]) for name, t in found.tensors.items())


def test_balanced_maps_are_the_same_maps(model):
    fitted = pruner_of(model).compensation
    even, hidden = balanced(fitted), torch.randn(2, 5, 32)
    assert torch.allclose(even.update(hidden, 2), fitted.update(hidden, 2), rtol=1e-4, atol=1e-5)
    assert torch.allclose(even.tensors["block.down"][1].norm(), even.tensors["block.up"][1].norm())


def test_what_cannot_be_distilled_is_refused(model):
    with pytest.raises(UserError, match="nothing to skipped tokens"):
        distil_compensation(model, TokenPruner(StaticRouter(), SCHEDULE), EVEN)
    with pytest.raises(UserError, match="nothing to distil"):
        distil_compensation(model, pruner_of(model).changed(schedule=Schedule.uniform(4, 0.0)), EVEN)
    for about in ({"epochs": -1}, {"batch_size": 0}, {"accumulate": 0}, {"learning_rate": 0.0}):
        with pytest.raises(UserError, match="distillation is"):
            DistillationSettings(**about)
