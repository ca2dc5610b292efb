"""Router training: only the router learns, is saved, and the losses do what they are for."""

import pytest
import torch
from test_engine import BLOCKS, seeded, tiny_llama

from ftp_lightning import DynamicRouter, Schedule, StaticRouter, TokenPruner, UserError
from ftp_lightning.data.rows import Rows
from ftp_lightning.lit.fitting import fit_router
from ftp_lightning.lit.router_training import RouterTraining, TrainingSettings

SCHEDULE = Schedule([0.0, 0.5, 0.5, 0.5])


def windows(count, seed=0):
    ids = torch.randint(3, 64, (count, 24), generator=torch.Generator().manual_seed(seed))
    return Rows.even(ids, 18, ["plain"] * count, list(range(count)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("train"), tiny_llama(torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}
    pruner = TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="keep")
    metrics = fit_router(
        model, pruner, windows(32), windows(4, 9), TrainingSettings(steps=30, batch_size=4, seed=3), folder
    )
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    return folder, model, pruner, metrics


def test_metrics_tell_every_step(trained):
    _, _, _, metrics = trained
    assert [row["step"] for row in metrics["steps"]] == list(range(1, 31))
    assert metrics["parameters"] == 450 and metrics["validation_kl"][0]["step"] == 0
    assert metrics["best_validation_kl"] == pytest.approx(min(v["kl"] for v in metrics["validation_kl"][1:]))
    assert metrics["target_sparsity"] == list(SCHEDULE.sparsity) and metrics["soft_sparsity"][0] == 0.0


def test_guide_teaches_the_static_order(tmp_path):
    model, pruner = tiny_llama(torch.float32), TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="keep")
    settings = TrainingSettings(steps=30, batch_size=4, lambda_d=0.0, lambda_s=0.0, guide_share=1.0)
    steps = fit_router(model, pruner, windows(32), windows(4, 9), settings, tmp_path)["steps"]
    assert steps[-1]["agreement"] > 0.9 > steps[0]["agreement"] and steps[-1]["guide"] < steps[0]["guide"]
    assert steps[0]["guide_weight"] == 1.0 and steps[-1]["guide_weight"] == pytest.approx(1 / 30)


def test_the_best_state_is_the_one_that_is_left(trained):
    folder, _, pruner, _ = trained
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(best[f"router.{name}"], value) for name, value in pruner.router.state_dict().items())


def test_a_schedule_of_zeros_has_nothing_to_train():
    with pytest.raises(UserError, match="nothing to train"):
        RouterTraining(tiny_llama(), TokenPruner(DynamicRouter(), Schedule.uniform(BLOCKS, 0.0)), TrainingSettings())


def test_checkpoints_hold_the_router_alone(trained):
    folder = trained[0] / "checkpoints"
    for name in ("best.ckpt", "last.ckpt"):
        checkpoint = torch.load(folder / name, weights_only=True)
        assert sum(t.numel() for t in checkpoint["state_dict"].values()) == 450
        assert (folder / name).stat().st_size < 100_000


def test_the_same_seed_gives_the_same_router(trained, tmp_path):
    _, model, pruner, metrics = trained
    again = TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="keep")
    repeated = fit_router(
        model, again, windows(32), windows(4, 9), TrainingSettings(steps=30, batch_size=4, seed=3), tmp_path
    )
    assert repeated == metrics
    assert all(
        torch.equal(a, b) for a, b in zip(pruner.router.state_dict().values(), again.router.state_dict().values())
    )


def test_sparsity_loss_raises_the_soft_sparsity(tmp_path):
    model, router = tiny_llama(torch.float32), seeded(DynamicRouter)
    torch.nn.init.constant_(router.mlp[2].bias, 0.0)
    router.mlp[2].bias.data[1] = 3.0  # computes nearly everything: under-pruned
    pruner = TokenPruner(router, SCHEDULE, kv="keep")
    settings = TrainingSettings(steps=40, batch_size=4, lambda_d=0.0, lambda_g=0.0)
    metrics = fit_router(model, pruner, windows(32), windows(4, 9), settings, tmp_path)
    assert metrics["steps"][0]["sparsity"] > 0.5 and metrics["steps"][-1]["sparsity"] < 0.1


def test_student_is_the_teacher_where_only_the_last_block_is_pruned_under_keep():
    model = tiny_llama(torch.float64)
    pruner = TokenPruner(seeded(DynamicRouter), Schedule([0.0, 0.0, 0.0, 0.5]), kv="keep")
    system = RouterTraining(model, pruner, TrainingSettings())
    batch = {"input_ids": windows(2).input_ids, "prompt_tokens": 18}
    student, teacher, _ = system.student_and_teacher(batch)
    # the last prompt token is reserved and everything behind it dense: under `keep` the student is the teacher there
    assert torch.allclose(student["hidden"], teacher["hidden"], atol=1e-12)


def test_validations_ask_the_dense_model_once(tmp_path, monkeypatch):
    """Its logits are kept while they fit, which changes no number."""
    asked, dense, found = RouterTraining._continuation, [], []
    monkeypatch.setattr(
        RouterTraining, "_continuation", lambda self, *batch: dense.append(self.model) or asked(self, *batch)
    )
    settings = TrainingSettings(steps=4, batch_size=2, validations=2)
    for limit in (1 << 30, 0):
        monkeypatch.setattr("ftp_lightning.lit.router_training.TEACHER_BYTES", limit)
        pruner = TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="keep")
        found.append(
            fit_router(tiny_llama(torch.float32), pruner, windows(8), windows(4, 9), settings, tmp_path / str(limit))[
                "validation_kl"
            ]
        )
        found.append(len(dense))
        dense.clear()
    kept, few, again, many = found
    assert len(kept) == 3 and kept == again
    assert (few, many) == (
        3 * 2 + 2,
        3 * 2 + 3 * 2,
    )  # two batches: pruned at every validation, and dense once or always


def test_a_router_without_parameters_is_refused():
    with pytest.raises(UserError, match="nothing to train"):
        RouterTraining(tiny_llama(), TokenPruner(StaticRouter(), Schedule.uniform(BLOCKS, 0.5)), TrainingSettings())
    for bad in ({"steps": 0}, {"learning_rate": 0.0}, {"guide_share": 2.0}):
        with pytest.raises(UserError):
            TrainingSettings(**bad)


def test_nan_loss_is_a_clear_error(tmp_path):
    model = tiny_llama(torch.float32)
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="loss is nan"):
        fit_router(
            model,
            TokenPruner(seeded(DynamicRouter), SCHEDULE),
            windows(8),
            windows(2, 9),
            TrainingSettings(steps=2),
            tmp_path,
        )


def test_the_learning_rate_falls_linearly_to_a_twentieth():
    pruner = TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="keep")
    system = RouterTraining(tiny_llama(torch.float32), pruner, TrainingSettings(steps=10, learning_rate=0.02))
    made = system.configure_optimizers()
    optimizer, decay, rates = made["optimizer"], made["lr_scheduler"]["scheduler"], []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        decay.step()
    assert rates == pytest.approx([0.02 * (1 - step / 10) for step in range(10)] + [0.001])
    assert made["lr_scheduler"]["interval"] == "step"


@pytest.mark.parametrize("names", [("position", "sparsity"), ("position", "attention", "rank", "sparsity")])
@pytest.mark.parametrize("settings", [{}, {"distillation": "kl"}, {"recompute": True}])
def test_the_student_starts_at_its_first_routed_block(names, settings):
    """What enters it the teacher has computed: the same loss and gradients, bit by bit, and fewer calls of blocks."""
    model, found, calls = tiny_llama(torch.float32), [], []
    handles = [block.mlp.register_forward_pre_hook(lambda *_: calls.append(1)) for block in model.model.layers]
    for lends in (True, False):
        pruner = TokenPruner(seeded(lambda: DynamicRouter(names=names)), Schedule([0.0, 0.0, 0.5, 0.5]), kv="keep")
        system = RouterTraining(model, pruner, TrainingSettings(batch_size=2, **settings))
        if not lends:
            system._first_needed = lambda pruner: 0
        calls.clear()
        loss = system.training_step({"input_ids": torch.arange(3, 51).view(2, 24), "prompt_tokens": 16}, 0)
        forward = len(calls)
        loss.backward()
        found.append((loss.detach(), forward, [p.grad for p in pruner.router.parameters()]))
    for handle in handles:
        handle.remove()
    (ours, few, own), (whole, many, theirs) = found
    assert torch.equal(ours, whole) and all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))
    # with attention the last dense block runs, too: it writes what the router reads
    assert many - few == (1 if "rank" in names else 2)
