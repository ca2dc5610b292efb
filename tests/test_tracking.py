"""Loggers write under the stage's folder and nowhere else; what a stage found can be read back; no key is written."""

import csv
import errno
import json
import os
from pathlib import Path

import pytest
from wandb_log import read_run

from ftp_lightning.__main__ import parse
from ftp_lightning.errors import UserError
from ftp_lightning.report.tracked import gates_png, schedule_png
from ftp_lightning.tracking import RUN, _run_id, log_outcome, logging_to, make_logger

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def wandb_home(tmp_path, monkeypatch):
    """No key, no earlier settings, and every place that wandb could write to under this folder."""
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home / "config"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return home


def test_none_is_no_logger(tmp_path):
    assert make_logger("none", tmp_path, {}, "train") is False
    log_outcome(False, numbers={"kl": 1.0})
    assert not list(tmp_path.iterdir())


def test_csv_holds_what_was_logged_and_an_interrupted_log_goes(tmp_path):
    for value in (1.0, 2.0):
        with logging_to("csv", tmp_path, {}, "train") as logger:
            logger.log_metrics({"loss": value}, step=0)
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"loss": "2.0", "step": "0"}]


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
@pytest.mark.parametrize(
    ("settings", "resumed", "left"),
    [({"seed": 0}, 3, [0, 1, 2, 3]), ({"seed": 0}, 2, [0, 1, 2]), ({"seed": 1}, 3, [3])],
    ids=["goes on", "repeats a step", "other settings"],
)
def test_a_log_survives_resuming(tmp_path, kind, settings, resumed, left):
    with logging_to(kind, tmp_path, {"seed": 0}, "train") as logger:
        for step in range(3):
            logger.log_metrics({"loss": float(step)}, step=step)
    with logging_to(kind, tmp_path, settings, "train") as logger:
        logger.save()  # as Lightning's Trainer does before it logs
        logger.log_metrics({"loss": 9.0, "new": 1.0}, step=resumed)
    assert logged(kind, tmp_path / "logs") == [(step, 9.0 if step == resumed else float(step)) for step in left]
    with logging_to(kind, tmp_path, settings, "train"):
        pass
    assert len(logged(kind, tmp_path / "logs")) == len(left)


def logged(kind, folder):
    """(step, loss) of every row that a reader of the log is shown."""
    if kind == "csv":
        with (folder / "metrics.csv").open() as file:
            return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_a_csv_log_that_was_cut_loses_its_last_line_alone(tmp_path):
    with logging_to("csv", tmp_path, {}, "train") as logger:
        for step in range(2):
            logger.log_metrics({"loss": float(step)}, step=step)
    with (tmp_path / "logs" / "metrics.csv").open("a") as file:
        file.write("0.5")
    with logging_to("csv", tmp_path, {}, "train") as logger:
        logger.log_metrics({"loss": 2.0}, step=2)
    assert logged("csv", tmp_path / "logs") == [(0, 0.0), (1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("content", [b"step,kl\n1,\xff\xfe\n", b"step,kl\n1," + b"9" * 200_000])
def test_a_csv_log_that_is_broken_is_set_aside(tmp_path, capsys, content):
    with logging_to("csv", tmp_path, {}, "train") as logger:
        logger.log_metrics({"loss": 1.0}, step=1)
    (tmp_path / "logs/metrics.csv").write_bytes(content)
    with logging_to("csv", tmp_path, {}, "train") as logger:
        logger.log_metrics({"loss": 2.0}, step=2)
    assert logged("csv", tmp_path / "logs") == [(2, 2.0)]
    assert (tmp_path / "logs/metrics.csv.broken-1").read_bytes() == content and "is broken" in capsys.readouterr().err


def test_csv_takes_a_history_after_the_fact(tmp_path):
    with logging_to("csv", tmp_path, {}, "trial") as logger:
        log_outcome(logger, numbers={"kl": 0.5, "kept": None}, history=[{"step": 1, "total": 3.0}])
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        found = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert found == [{"step": "1", "train/total": "3.0"}, {"step": "2", "kl": "0.5"}]


def test_tensorboard_holds_numbers_and_images(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    with logging_to("tensorboard", tmp_path, {"budget": 0.3}, "train") as logger:
        log_outcome(logger, numbers={"kl": 0.5}, images={"schedule": lambda: schedule_png([0.1, 0.5])})
    events = accumulator.EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [event.value for event in events.Scalars("kl")] == [0.5]
    assert events.Images("schedule")[0].encoded_image_string.startswith(b"\x89PNG")


def test_wandb_without_a_key_is_offline_and_each_stage_has_its_own_run(tmp_path, wandb_home):
    ids = set()
    for stage in ("search", "train"):
        with logging_to("wandb", tmp_path / "demo" / stage, {"budget": 0.3}, stage) as logger:
            logger.log_metrics({"loss": 1.0}, step=0)
        run = read_run(tmp_path / "demo" / stage)
        assert (run["group"], run["job_type"], run["exit"]) == ("demo", stage, 0)
        ids.add(run["id"])
    assert len(ids) == 2
    assert not (wandb_home / "netrc").exists()
    assert "WANDB_DATA_DIR" not in os.environ


def test_an_offline_run_holds_all_that_was_found(tmp_path, wandb_home):
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "pruner.json").write_text("{}")
    keep = [[1, 1, 0, 1], [1, 0, 0, 1]]
    with logging_to("wandb", tmp_path / "run", {"budget": 0.3, "factors": ["rank"]}, "trial", "factors") as logger:
        log_outcome(
            logger,
            numbers={"kl": 0.25, "kept": None},
            history=[{"step": step, "total": 1.0 / step} for step in (1, 2, 3)],
            images={"schedule": lambda: schedule_png([0.1, 0.5], [0.1, 0.4]), "gates": lambda: gates_png(keep)},
            tables={"starts": [{"start": "uniform", "loss": 0.5}, {"start": "ramp", "loss": 0.125}]},
            pruned=tmp_path / "pruned",
        )
    run = read_run(tmp_path / "run")
    assert (run["config"]["budget"], run["config"]["factors"]) == (0.3, ["rank"])
    assert (run["group"], run["job_type"]) == ("factors", "trial")
    assert [row["train/total"] for row in run["history"] if "train/total" in row] == pytest.approx([1, 1 / 2, 1 / 3])
    assert [row["kl"] for row in run["history"] if "kl" in row] == [0.25]
    images = [row[name] for row in run["history"] for name in ("schedule", "gates") if name in row]
    assert [image["_type"] for image in images] == ["images/separated"] * 2
    (media,) = (tmp_path / "run").rglob("offline-run-*/files/media")
    assert len(list(media.rglob("*.png"))) == 2
    (table,) = media.rglob("*.table.json")
    assert json.loads(table.read_text())["data"] == [["uniform", 0.5], ["ramp", 0.125]]
    assert [("pruner", ["pruner.json"])] == [(kind, paths) for _, kind, paths in run["artifacts"] if kind == "pruner"]
    staged = [path for path in (tmp_path / "run").rglob("*") if "staging" in path.parts and path.is_file()]
    assert staged and not (wandb_home / ".local").exists()


def test_an_interrupted_stage_goes_on_in_its_run_and_another_one_does_not(tmp_path, wandb_home):
    ids = []
    for config in ({"steps": 2}, {"steps": 2}, {"steps": 3}):
        logger = make_logger("wandb", tmp_path, config, "train")
        ids.append(logger._id)
        assert logger._wandb_init["resume"] == "allow"
    assert ids[0] == ids[1] != ids[2]


def test_logs_whose_run_cannot_be_read_just_now_are_kept(tmp_path, monkeypatch):
    first, read = _run_id(tmp_path, {"seed": 1}), Path.read_text

    def failing(path, *args, **kwargs):
        if path.name == RUN:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="resume"):
        patch.setattr(Path, "read_text", failing)
        _run_id(tmp_path, {"seed": 1})
    assert _run_id(tmp_path, {"seed": 1}) == first != _run_id(tmp_path, {"seed": 2})


def test_under_an_agent_the_run_is_the_agents(tmp_path, wandb_home, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "agents")
    with logging_to("wandb", tmp_path, {"label": "four factors", "seed": 2}, "trial") as logger:
        logger.log_metrics({"kl": 1.0}, step=0)
    run = read_run(tmp_path)
    assert (run["id"], run["name"]) == ("agents", "four factors, seed 2")


def test_a_key_is_in_no_file_and_no_line(tmp_path, wandb_home, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_SILENT")
    with logging_to("wandb", tmp_path / "run", {"budget": 0.3}, "train") as logger:
        log_outcome(logger, numbers={"kl": 0.5}, tables={"rows": [{"a": 1}]})
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []
    assert KEY not in "".join(capfd.readouterr())


def test_online_where_a_key_is_there_and_not_where_the_user_says_no(monkeypatch):
    import wandb

    from ftp_lightning import tracking

    asked = []
    monkeypatch.setattr(wandb, "login", lambda **how: asked.append(how) or True)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert tracking._may_go_online() and asked == [{"prompt": False, "verify": False}]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not tracking._may_go_online() and len(asked) == 1


def test_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mlflow"):
        make_logger("mlflow", tmp_path, {}, "train")


@pytest.mark.slow
def test_every_stage_tells_wandb_what_it_found(tmp_path, wandb_home, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tiny = ["--model=random:tiny", "--device=cpu", "--tracking=wandb", "--prompt_tokens=96", "--continuation_tokens=8"]
    text = ["--recall_share=0.5", "--windows=2"]
    training = ["--steps=3", "--batch_size=2", "--validations=1", "--validation_windows=2", "--budget=0.3"]
    asked = {
        "search": [*text, "--generations=2", "--offspring=2"],
        "train": training,
        "sensitivity": [*text, "--levels=0.5"],
        "evaluate": ["--budget=0.3", "--tasks=", "--windows=2"],
    }
    runs = {}
    for stage, flags in asked.items():
        folder = tmp_path / "chain" / stage
        parse(stage, [*tiny, *flags, f"--output={folder}"]).execute()
        runs[stage] = read_run(folder)
    assert {(run["group"], run["job_type"]) for run in runs.values()} == {("chain", stage) for stage in asked}
    logged = {stage: {name for row in run["history"] for name in row} for stage, run in runs.items()}
    assert {"search/best", "schedule", "gates", "starts"} <= logged["search"]
    assert {"train/distillation", "train/total", "validation_kl", "schedule", "gates"} <= logged["train"]
    assert sum("train/total" in row for row in runs["train"]["history"]) == 3
    assert any(kind == "pruner" for _, kind, _ in runs["train"]["artifacts"])
    assert {"sensitivity", "blocks"} <= logged["sensitivity"]
    assert {"methods", "gates", "realised", "kl"} <= logged["evaluate"]


def test_wandb_that_is_disabled_records_nothing_and_one_that_cannot_start_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with logging_to("wandb", tmp_path, {}, "search") as logger:
        assert logger is False
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("WANDB_MODE", "offline")

    def homeless(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("ftp_lightning.tracking._wandb", homeless)
    with pytest.raises(UserError, match="wandb, which cannot start: Could not determine home"):
        make_logger("wandb", tmp_path, {}, "search")
