"""Stage `train` end to end: rows of both kinds, families, variants; what it refuses."""

import json

import pytest

from ftp_lightning import Schedule, TokenPruner, UserError
from ftp_lightning.schedule_family import ScheduleFamily
from ftp_lightning.stages.train import TrainStage

SMALL = {"steps": 2, "batch_size": 2, "validations": 1, "validation_windows": 2, "tracking": "none", "device": "cpu"}


def train(folder, **changes):
    TrainStage(**SMALL | {"output": str(folder)} | changes).execute()
    return json.loads((folder / "metrics.json").read_text()), TokenPruner.load(folder / "pruned")


def records(path):
    rows = [
        {"instruction": f"Say {n} in words, please.", "input": "", "output": f"This is {n}." * (n % 3)}
        for n in range(90)
    ]
    path.write_text(json.dumps(rows))
    return str(path)


def family(path):
    blocks = 12
    ScheduleFamily([Schedule.uniform(blocks, 0.2), Schedule.uniform(blocks, 0.6)]).save(path)
    return str(path)


def test_examples_are_counted_and_trained_on(tmp_path):
    metrics, pruner = train(tmp_path / "run", data=records(tmp_path / "r.json"), rows="examples", budget=0.3)
    assert len(metrics["steps"]) == 2 and metrics["empty_response"] > 0 and metrics["examples"] > 0
    assert pruner.schedule.budget == pytest.approx(0.3)


def test_a_family_and_a_variant(tmp_path):
    about = {"schedule": family(tmp_path / "schedules.json"), "budgets": (0.2, 0.6), "router": "recurrent"}
    metrics, pruner = train(tmp_path / "run", **about, window=16, random_prompt=True, gates="gumbel")
    assert pruner.schedule.budget == pytest.approx(0.4) and pruner.window == 16
    assert metrics["parameters"] == pruner.router.parameter_count != 450


@pytest.mark.parametrize(
    "bad,said",
    [
        ({"budgets": (0.2, 0.6)}, "schedules.json"),
        ({"rows": "examples", "random_prompt": True}, "random_prompt"),
        ({"factors": ("colour",)}, "colour"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, bad, said):
    with pytest.raises(UserError, match=said):
        train(tmp_path / "run", budget=0.3, **bad)
    assert not (tmp_path / "run").exists()


def test_budgets_beyond_the_family_or_the_wrong_way_round_are_told(tmp_path):
    path = family(tmp_path / "schedules.json")
    for budgets, said in (((0.6, 0.2), "lowest"), ((0.2, 0.8), "at most 0.6"), ((0.2,), "lowest")):
        with pytest.raises(UserError, match=said):
            train(tmp_path / "run", schedule=path, budgets=budgets)
