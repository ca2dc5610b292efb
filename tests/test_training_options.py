"""What router training can be told: losses, gates, accumulation, recomputing, budgets, scope; each against a truth."""

import copy
import itertools

import pytest
import torch
from families import family
from test_engine import BLOCKS, seeded, tiny_llama
from test_masked_padding import LENGTHS, ROWS, padded
from test_router_training import SCHEDULE, windows

from ftp_lightning import DynamicRouter, FixedRouter, Schedule, TokenPruner, UserError, losses
from ftp_lightning.data.module import RowsData
from ftp_lightning.data.rows import Row, Rows
from ftp_lightning.lit.fitting import fit, fit_router
from ftp_lightning.lit.router_training import RouterTraining
from ftp_lightning.lit.training_settings import TrainingSettings
from ftp_lightning.routing import make_router
from ftp_lightning.schedule_family import ScheduleFamily
from ftp_lightning.training.gates import Gumbel, Soft, StraightThrough

FAMILY = ScheduleFamily([Schedule([0.0, 0.2, 0.2, 0.0]), Schedule([0.2, 0.8, 0.8, 0.6])])


def system(model=None, kv="keep", **changes):
    pruner = TokenPruner(seeded(DynamicRouter), SCHEDULE, kv=kv)
    return RouterTraining(model or tiny_llama(torch.float64), pruner, TrainingSettings(**changes))


def batch_of(rows, prompt=18, number=0):
    return {"input_ids": rows.input_ids, "prompt_tokens": prompt, "number": number}


def loss_and_gradient(found, batch):
    found.router.zero_grad()
    found._forwards = []
    loss = found.training_step(batch, 0)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in found.router.parameters()])


@pytest.mark.parametrize("kind", losses.DISTILLATION)
@pytest.mark.parametrize("sparsity", losses.SPARSITY)
def test_a_batch_is_the_mean_of_its_rows(kind, sparsity):
    found, rows = system(distillation=kind, sparsity_loss=sparsity, guide_balanced=True), windows(4)
    whole = loss_and_gradient(found, batch_of(rows))
    single = [loss_and_gradient(found, batch_of(rows.subset([row]))) for row in range(4)]
    assert whole[0] == pytest.approx(sum(loss for loss, _ in single) / 4, rel=1e-6)
    assert torch.allclose(whole[1], sum(gradient for _, gradient in single) / 4, rtol=1e-4, atol=1e-7)


def test_accumulated_forwards_are_one_larger_batch(tmp_path):
    def steps(batch_size, accumulate):
        model, pruner = tiny_llama(torch.float32), TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="keep")
        settings = TrainingSettings(steps=20, batch_size=batch_size, accumulate=accumulate, seed=3)
        return fit_router(model, pruner, windows(32), windows(4, 9), settings, tmp_path / f"{batch_size}")["steps"]

    for one, two in zip(steps(4, 1), steps(2, 2), strict=True):
        assert one["step"] == two["step"] and one["seen"] == two["seen"]
        for name in ("distillation", "sparsity", "guide", "total", "gradient_norm"):
            assert two[name] == pytest.approx(one[name], abs=1e-5, rel=1e-4)


@pytest.mark.parametrize("kv", ["keep", "evict"])
def test_recomputed_blocks_give_the_same_gradient(kv):
    model, rows = tiny_llama(torch.float64), windows(2)
    plain, again = (loss_and_gradient(system(model, kv, recompute=on), batch_of(rows)) for on in (False, True))
    assert plain[0] == again[0] and torch.equal(plain[1], again[1])


def test_recomputing_keeps_less():
    model, rows, kept = tiny_llama(torch.float64), windows(8), []
    for on in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            system(model, recompute=on).training_step(batch_of(rows), 0)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


def test_soft_gates_have_the_exact_gradient():
    """Finite differences of the whole loss, no decision changing on the way; under `keep` keys do not depend on it."""
    found, batch = system(gates="soft", guide_share=1.0), batch_of(windows(2))
    _, gradient = loss_and_gradient(found, batch)
    bias = found.router.mlp[2].bias
    differences = []
    for sign in (1, -1):
        with torch.no_grad():
            bias[1] += sign * 1e-2
        differences.append(found.training_step(batch, 0).item())
        with torch.no_grad():
            bias[1] -= sign * 1e-2
    # router weights are float32: the difference quotient is good to a few per mille
    assert gradient[-1].item() == pytest.approx((differences[0] - differences[1]) / 2e-2, rel=2e-2)


@pytest.mark.parametrize("gates", [StraightThrough(), Gumbel(0.7, torch.Generator().manual_seed(1))])
def test_hard_gates_compute_what_their_decisions_say(gates):
    model, rows, pruner = (
        tiny_llama(torch.float64),
        windows(3),
        TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="evict"),
    )
    with pruner(model), pruner.masked(18, gates):
        student = model.model(input_ids=rows.input_ids, use_cache=False).last_hidden_state
        keep = [k[:, :18] for k in pruner.trace.keep]
    replay = TokenPruner(FixedRouter(keep), None, kv="evict")
    with replay(model), replay.masked(18):
        again = model.model(input_ids=rows.input_ids, use_cache=False).last_hidden_state
    assert torch.allclose(student, again, atol=1e-12)


def test_gumbel_noise_comes_from_the_batch_number_and_is_gone_at_evaluation():
    settings = TrainingSettings(gates="gumbel", temperature=(2.0, 0.5), steps=11)
    p = torch.full((1, 4), 0.5)
    first, same, other = (settings.gates_at(0, number).relax(p) for number in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert settings.gates_at(0, 0).temperature == 2.0 and settings.gates_at(10, 0).temperature == pytest.approx(0.5)
    assert settings.gates_at(5, 0).temperature == pytest.approx(1.0)
    model, found = tiny_llama(torch.float64), system(gates="gumbel")
    with found.pruner(model):
        outputs = [model(input_ids=windows(1).input_ids).logits for _ in range(2)]
    assert torch.equal(*outputs)


def test_soft_blends_and_hard_chooses():
    rows, base = torch.ones(1, 3, 2), torch.zeros(1, 3, 2)
    keep, gate = torch.tensor([[True, False, True]]), torch.tensor([[0.8, 0.4]], requires_grad=True)
    whole = torch.nn.functional.pad(gate, (0, 1), value=1.0)  # the last token is computed whatever the router says
    assert Soft().blend(rows, base, keep, whole)[0, :, 0].tolist() == pytest.approx([0.8, 0.4, 1.0])
    hard = StraightThrough().blend(rows, base, keep, whole)
    assert hard[0, :, 0].tolist() == [1.0, 0.0, 1.0]
    hard.sum().backward()
    assert gate.grad.tolist() == [[2.0, 2.0]]


def test_every_batch_has_a_budget_of_its_own():
    pruner = TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="keep")
    found = RouterTraining(tiny_llama(), pruner, TrainingSettings(seed=5), FAMILY, (0.2, 0.5))
    drawn = [found.training_schedule(number).budget for number in range(50)]
    assert drawn == [found.training_schedule(number).budget for number in range(50)]
    assert 0.2 <= min(drawn) < 0.25 < 0.45 < max(drawn) <= 0.5
    assert [one.budget for one in found.validation_schedules()] == pytest.approx([0.2, 0.35, 0.5])
    _, _, used = found.student_and_teacher(batch_of(windows(1), number=7))
    assert used.schedule.budget == drawn[7]


def test_one_router_learns_under_a_family(tmp_path):
    pruner = TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="keep")
    settings = TrainingSettings(steps=6, batch_size=2, validations=1)
    found = RouterTraining(tiny_llama(torch.float32), pruner, settings, FAMILY, (0.1, 0.5))
    metrics = fit(found, RowsData(windows(8), windows(2, 9), 2), tmp_path)
    assert len(metrics["steps"]) == 6 and all(row["gradient_norm"] > 0 for row in metrics["steps"])


def test_scope_sequence_routes_and_scores_the_whole_text():
    found, batch = system(scope="sequence"), batch_of(windows(2))
    student, _, pruner = found.student_and_teacher(batch)
    assert student["hidden"].shape[1] == 23 and pruner.decisions[0].keep.shape == (2, 24)
    found = system(scope="prompt")
    student, _, pruner = found.student_and_teacher(batch)
    assert student["hidden"].shape[1] == 6 and pruner.decisions[0].keep.shape == (2, 18)


def test_a_row_without_a_token_to_score_counts_for_nothing():
    rows, model = windows(3), tiny_llama(torch.float64)
    mask = torch.ones_like(rows.input_ids)
    mask[1, 18:] = 0
    found = system(model, lambda_s=0.0, lambda_g=0.0)
    batch = batch_of(rows) | {"attention_mask": mask}
    loss, _ = loss_and_gradient(found, batch)
    others, _ = loss_and_gradient(found, batch_of(rows.subset([0, 2])))
    assert loss == pytest.approx(others * 2 / 3, rel=1e-6) and found._forwards[0]["empty_rows"] == 0
    found._forwards = []
    found.training_step(batch, 0)
    assert found._forwards[0]["empty_rows"] == 1 and found._forwards[0]["tokens"] == 3 * 24 - 6


@pytest.mark.parametrize(
    "name", ["dynamic", "local", "recurrent", "hidden", "hidden+factors", "one_pass", "projected", "projected_once"]
)
def test_every_variant_trains(name, tmp_path):
    model = tiny_llama(torch.float32)
    torch.manual_seed(0)
    router = make_router(name, BLOCKS, model.config.hidden_size)
    before = copy.deepcopy(router.state_dict())
    settings = TrainingSettings(steps=3, batch_size=2, validations=1)
    metrics = fit_router(model, TokenPruner(router, SCHEDULE, kv="keep"), windows(8), windows(2, 9), settings, tmp_path)
    assert metrics["parameters"] == router.parameter_count
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert any(not torch.equal(last[f"router.{key}"], value) for key, value in before.items())
    best = min(metrics["validation_kl"], key=lambda row: row["kl"])  # the state that is kept is the best, or the given
    for key, value in router.state_dict().items():
        assert torch.equal(value, last[f"router.{key}"] if best["step"] else before[key])


def test_a_training_that_harms_leaves_the_router_as_it_was(tmp_path):
    model, pruner = tiny_llama(torch.float32), TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="keep")
    fit_router(model, pruner, windows(32), windows(4, 9), TrainingSettings(steps=20, batch_size=2), tmp_path / "first")
    before, rows = copy.deepcopy(pruner.router.state_dict()), (windows(8), windows(4, 9))
    wild = TrainingSettings(steps=4, batch_size=2, learning_rate=30.0, lambda_d=0.0)
    metrics = fit_router(model, pruner, *rows, wild, tmp_path / "second")
    assert all(row["kl"] >= metrics["validation_kl"][0]["kl"] for row in metrics["validation_kl"])
    assert metrics["best_validation_kl"] == metrics["validation_kl"][0]["kl"]
    assert all(torch.equal(value, before[key]) for key, value in pruner.router.state_dict().items())


def test_training_stops_where_validation_no_longer_falls(tmp_path):
    model, pruner = tiny_llama(torch.float32), TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="keep")
    settings = TrainingSettings(steps=20, batch_size=2, learning_rate=1e-12, validations=10, patience=2)
    metrics = fit_router(model, pruner, windows(8), windows(2, 9), settings, tmp_path)
    assert len(metrics["steps"]) < 20


@pytest.mark.parametrize(
    "bad",
    [{"gates": "hard"}, {"temperature": (1.0,)}, {"temperature": (0.0, 1.0)}, {"accumulate": 0}, {"patience": 0}]
    + [{name: "nothing"} for name in ("distillation", "sparsity_loss", "guide_decay", "scope")],
)
def test_impossible_settings_are_told(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        TrainingSettings(**bad)


def test_decays_end_where_they_are_told():
    for decay, half in zip(losses.DECAYS, (1.0, 1.0, 2.0), strict=True):
        weights = [losses.guide_weight(2.0, step, 100, 0.5, decay) for step in (0, 25, 50, 99)]
        assert weights == pytest.approx([2.0, half, 0.0, 0.0])


def test_balanced_guide_weighs_both_classes_alike():
    p, real = torch.tensor([[0.9, 0.9, 0.9, 0.6]]), torch.ones(1, 4, dtype=torch.bool)
    decision = torch.tensor([[1, 1, 1, 0]])
    right, wrong = -torch.tensor(0.9).log(), -torch.tensor(0.4).log()
    assert torch.isclose(losses.guide_loss(p, decision, real), (3 * right + wrong) / 4)
    assert torch.isclose(losses.guide_loss(p, decision, real, balanced=True), (right + wrong) / 2)


def test_symmetric_sparsity_also_penalises_over_pruning():
    target, realised = [0.3, 0.5], [torch.tensor([0.1]), torch.tensor([0.7])]
    assert losses.sparsity_loss(target, realised).item() == pytest.approx(0.2)
    assert losses.sparsity_loss(target, realised, "symmetric").item() == pytest.approx(0.4)


def test_history_counts_what_was_seen(tmp_path):
    model, pruner = tiny_llama(torch.float32), TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="keep")
    settings = TrainingSettings(steps=4, batch_size=2, validations=1)
    steps = fit_router(model, pruner, windows(8), windows(2, 9), settings, tmp_path)["steps"]
    assert [row["seen"] for row in steps] == list(itertools.accumulate([2 * 24] * 4))
    for row in steps:
        weighted = [row[f"weighted_{name}"] for name in ("distillation", "sparsity", "guide")]
        assert sum(weighted) == pytest.approx(row["total"]) and 0 <= row["f1"] <= 1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padded_rows_lose_what_they_lose_alone(name):
    """GPT-2 adds its positions to the input: it shows at once where they count padding."""
    model = family(name).double() if name == "gpt2" else tiny_llama(torch.float64)
    pruner = TokenPruner(seeded(DynamicRouter), Schedule([0.0, 0.5, 0.5, 0.5]), kv="keep")
    found = RouterTraining(model, pruner, TrainingSettings(distillation="both"))
    ids, mask = padded()
    together = found.training_step({"input_ids": ids, "attention_mask": mask, "prompt_tokens": 18}, 0)
    alone = [
        found.training_step({"input_ids": row[None], "prompt_tokens": prompt}, 0)
        for row, (prompt, _) in zip(ROWS, LENGTHS)
    ]
    assert together.item() == pytest.approx(sum(alone).item() / len(alone), rel=1e-6)
    kl = [
        found.validate_rows({"input_ids": row[None], "prompt_tokens": p}).item() for row, (p, _) in zip(ROWS, LENGTHS)
    ]
    both = found.validate_rows({"input_ids": ids, "attention_mask": mask, "prompt_tokens": 18})
    assert both.tolist() == pytest.approx(kl, rel=1e-6)


@pytest.mark.parametrize("kv", ["keep", "evict"])
def test_validation_rows_of_any_length_are_what_they_are_alone(kv):
    ids = [row.prompt + row.continuation for row in windows(4).rows]
    rows = Rows([Row(row[:p], row[p : p + c]) for row, (p, c) in zip(ids, ((18, 6), (7, 2), (12, 6), (7, 4)))])
    found = system(kv=kv)
    alone = torch.cat([found.validate_rows(rows.batch([i])) for i in range(4)])
    assert torch.allclose(found.validate_rows(rows.batch(range(4))), alone, atol=1e-6) and alone.min() > 1e-6
