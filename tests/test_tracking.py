"""Loggers write under the stage's folder and nowhere else; no key is asked for or written."""

import csv

import pytest

from ftp_lightning.tracking import logging_to, make_logger


def test_none_is_no_logger(tmp_path):
    assert make_logger("none", tmp_path, {}, "train") is False
    assert not list(tmp_path.iterdir())


def test_csv_holds_what_was_logged_and_an_interrupted_log_goes(tmp_path):
    for value in (1.0, 2.0):
        with logging_to("csv", tmp_path, {}, "train") as logger:
            logger.log_metrics({"loss": value}, step=0)
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"loss": "2.0", "step": "0"}]


def test_wandb_without_a_key_is_offline_and_each_stage_has_its_own_run(tmp_path, monkeypatch):
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for stage in ("search", "train"):
        with logging_to("wandb", tmp_path / stage, {"budget": 0.3}, stage) as logger:
            logger.log_metrics({"loss": 1.0}, step=0)
        assert len(list((tmp_path / stage).rglob("offline-run-*/*.wandb"))) == 1
    assert not (tmp_path / "netrc").exists()


def test_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tensorboard"):
        make_logger("tensorboard", tmp_path, {}, "train")
