"""When router training measures, and on which device Lightning computes."""

import lightning
import pytest
import torch
from families import family
from hypothesis import given
from hypothesis import strategies as st

from ftp_lightning import DynamicRouter, Schedule, TokenPruner
from ftp_lightning.data.rows import Rows
from ftp_lightning.lit import fitting
from ftp_lightning.lit.fitting import fit_router
from ftp_lightning.lit.router_training import RouterTraining
from ftp_lightning.lit.training_settings import TrainingSettings
from ftp_lightning.processes import Processes
from ftp_lightning.stages import sensitivity

SCHEDULE = Schedule([0.0, 0.5, 0.5, 0.5])


class Counting(lightning.LightningModule):
    """As little as Lightning can train: what is measured is where."""

    def __init__(self):
        super().__init__()
        self.weight, self.measured = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, number):
        return self.weight.sum()

    def validation_step(self, batch, number):
        self.measured.append(self.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def measured(steps, validations, accumulate):
    """The steps at which the trainer of a router training validates."""
    settings = TrainingSettings(steps=steps, validations=validations, accumulate=accumulate)
    system = RouterTraining(MODEL, TokenPruner(DynamicRouter(), SCHEDULE), settings)
    trainer = fitting._trainer(system, Processes(), False, [fitting._MeasureLast(steps)])
    counting = Counting()
    batches = torch.utils.data.DataLoader(torch.zeros(steps * accumulate + 3, 1))
    trainer.fit(counting, batches, torch.utils.data.DataLoader(torch.zeros(1, 1)))
    return counting.measured


MODEL = family("llama", torch.float32)


@pytest.mark.parametrize(
    ("steps", "validations", "accumulate"), [(19, 5, 1), (7, 5, 2), (5, 9, 1), (11, 1, 3), (8, 4, 1)]
)
def test_the_trainer_measures_the_last_step(steps, validations, accumulate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Lightning's own checkpoints
    found = measured(steps, validations, accumulate)
    assert found[-1] == steps and len(found) <= validations and found == sorted({*found})


@given(steps=st.integers(1, 3000), validations=st.integers(1, 3000))
def test_every_interval_and_the_last_step_are_no_more_than_asked_for(steps, validations):
    interval = TrainingSettings(steps=steps, validations=validations).validation_interval
    points = {*range(interval, steps + 1, interval), steps}
    assert 1 <= len(points) <= validations


def test_the_last_step_can_be_chosen(tmp_path):
    """Of training whose state improves to the end, it is."""
    rows = torch.randint(3, 64, (8, 20), generator=torch.Generator().manual_seed(0))
    settings = TrainingSettings(steps=5, batch_size=2, validations=3)
    pruner = TokenPruner(DynamicRouter(), SCHEDULE, kv="keep")
    windows = Rows.even(rows, 16, ["plain"] * 8, list(range(8)))
    metrics = fit_router(MODEL, pruner, windows, windows, settings, tmp_path)
    assert [row["step"] for row in metrics["validation_kl"]] == [0, 2, 4, 5]
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["global_step"]
    assert best == min(metrics["validation_kl"][1:], key=lambda row: row["kl"])["step"]


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cuda:1", {"accelerator": "gpu", "devices": [1]}),
        ("cuda:0", {"accelerator": "gpu", "devices": [0]}),
        ("cuda", {"accelerator": "gpu", "devices": 1}),
        ("cpu", {"accelerator": "cpu", "devices": 1}),
    ],
)
def test_lightning_computes_where_the_model_lies(device, expected, monkeypatch):
    told = []
    monkeypatch.setattr(lightning, "Trainer", lambda **arguments: told.append(arguments))
    monkeypatch.setattr(fitting, "home", lambda model: torch.device(device))
    system = RouterTraining(MODEL, TokenPruner(DynamicRouter(), SCHEDULE), TrainingSettings())
    fitting._trainer(system, Processes(), None, [])
    sensitivity.quiet_trainer(torch.device(device), print)
    for arguments in told:
        assert {name: arguments[name] for name in expected} == expected
    assert len(told) == 2
