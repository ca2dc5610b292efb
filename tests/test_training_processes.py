"""Several processes train the router that one process trains."""

import functools
from types import SimpleNamespace

import pytest
import torch
from test_engine import seeded, tiny_llama
from test_router_training import SCHEDULE, windows

from ftp_lightning import DynamicRouter, TokenPruner
from ftp_lightning.data.module import RowsData
from ftp_lightning.lit.fitting import fit, fit_router
from ftp_lightning.lit.router_training import RouterTraining
from ftp_lightning.lit.training_settings import TrainingSettings
from ftp_lightning.models import model_identity
from ftp_lightning.processes import launch
from ftp_lightning.pruning.family import find_blocks
from ftp_lightning.sharding import shard

TOGETHER = {"steps": 20, "batch_size": 2, "gates": "gumbel", "validations": 2, "seed": 4}


def in_step(processes, device, folder, sharded=False, **more):
    """What one of several processes trains; the rows of all of them together."""
    pruner, settings = TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="keep"), TrainingSettings(**TOGETHER | more)
    model = tiny_llama(torch.float32).requires_grad_(False)
    if sharded:
        held = sum(weight.numel() for weight in model.parameters())
        known = model_identity(model)
        shard(model, processes, device)
        assert model_identity(model) == known
        local = sum(getattr(weight, "to_local", lambda w=weight: w)().numel() for weight in model.parameters())
        within = sum(weight.numel() for weight in find_blocks(model).parameters())
        assert local == held - within // 2
    system = RouterTraining(model, pruner, settings)
    data = RowsData(windows(32), windows(4, 9), settings.batch_size, settings.seed)
    metrics = fit(system, data, folder, processes=processes, fingerprint="same")
    return metrics, torch.cat([value.flatten() for value in pruner.router.state_dict().values()]).tolist()


@pytest.mark.parametrize(("world", "shares"), [(1, [[0, 1, 2]]), (2, [[0, 2], [1]]), (4, [[0, 1, 2]] * 4)])
def test_processes_share_the_validation_batches(world, shares):
    """Where there is one for each at least: without a batch Lightning would not wait for the others."""
    data = RowsData(windows(4), windows(5, 9), batch_size=2)
    whole, data.shares_validation = [batch["input_ids"].tolist() for batch in data.val_dataloader()], True
    for rank, share in enumerate(shares):
        data.trainer = SimpleNamespace(world_size=world, global_rank=rank)
        assert [batch["input_ids"].tolist() for batch in data.val_dataloader()] == [whole[place] for place in share]


@pytest.mark.slow
@pytest.mark.parametrize("about", [{}, {"sharded": True}, {"sharded": True, "recompute": True, "distillation": "kl"}])
def test_two_processes_are_one_that_accumulates_twice(about, tmp_path):
    """Also where each holds half of the frozen model's blocks."""
    two, weights = launch(2, torch.device("cpu"), functools.partial(in_step, **about), tmp_path / "two")
    pruner = TokenPruner(seeded(DynamicRouter), SCHEDULE, kv="keep")
    alone = {name: value for name, value in about.items() if name == "distillation"}
    settings = TrainingSettings(**TOGETHER, **alone, accumulate=2)
    one = fit_router(tiny_llama(torch.float32), pruner, windows(32), windows(4, 9), settings, tmp_path / "one")
    for a, b in zip(one["steps"], two["steps"], strict=True):
        assert a.keys() == b.keys()
        assert all(b[name] == pytest.approx(a[name], abs=1e-5, rel=1e-5) for name in a)
    assert [v["kl"] for v in two["validation_kl"]] == pytest.approx([v["kl"] for v in one["validation_kl"]], abs=1e-5)
    own = torch.cat([value.flatten() for value in pruner.router.state_dict().values()])
    assert torch.allclose(torch.tensor(weights), own, atol=1e-5)
