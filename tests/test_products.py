"""Of a finished run any single file may be lost or damaged: run, report and sweep say so or mend it, and never trip."""

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest

from ftp_lightning.__main__ import main
from ftp_lightning.cli.settings import StageSettings
from ftp_lightning.errors import UserError
from ftp_lightning.products import found_product, is_as_written, read_product
from ftp_lightning.report import page
from ftp_lightning.stages import run_inputs
from ftp_lightning.stages.run import RunStage

sys.path.insert(0, str(Path(__file__).parent / "faults"))

import kill  # noqa: E402
from attack import REPLACED  # noqa: E402


def finished(folder: Path, content: str = '{"value": 1}') -> Path:
    """A folder as a stage leaves it."""
    from ftp_lightning.artifact import StageFolder

    with StageFolder(folder, "search", {}, {}, "") as stage:
        stage.write_text("metrics.json", content)
    return folder


def test_a_product_is_read_as_it_was_written(tmp_path):
    folder = finished(tmp_path / "a")
    assert read_product(folder, "metrics.json") == {"value": 1} and is_as_written(folder, "metrics.json")
    assert found_product(folder, "other.json") is None
    with pytest.raises(UserError, match="other.json is missing"):
        read_product(folder, "other.json")


def test_a_product_that_cannot_be_read_just_now_is_no_reason_to_make_it_again(tmp_path, monkeypatch):
    folder, read = finished(tmp_path / "a"), Path.read_bytes

    def failing(path):
        if path.name == "metrics.json":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(UserError, match="metrics.json: Stale") as told:
        read_product(folder, "metrics.json")
    assert "--overwrite" not in str(told.value)


@pytest.mark.parametrize("kind", REPLACED)
def test_a_product_that_is_another_is_named(tmp_path, kind):
    folder, content = finished(tmp_path / "a"), REPLACED[kind]
    if content is None:
        (folder / "metrics.json").unlink()
    else:
        (folder / "metrics.json").write_bytes(content)
    with pytest.raises(UserError, match="metrics.json"):
        read_product(folder, "metrics.json")
    (folder / "provenance.json").unlink(missing_ok=True)  # without its record only what is no JSON is noticed
    if kind in ("binary", "cut"):
        with pytest.raises(UserError, match="metrics.json"):
            read_product(folder, "metrics.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main(kill.arguments_of("run", folder, folder / "run")) == 0
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(2))
def test_any_single_file_of_a_run_may_be_damaged(whole, tmp_path, monkeypatch, capsys, turn):
    """Each file in two of the seven ways, which come round in turn: every kind of file gets them all.

    The stages' own work is left out: what is made again is nothing here, which the chain must bear as well.
    """
    monkeypatch.setattr(page, "draw", lambda plot, rows: None)
    monkeypatch.setattr(run_inputs, "check_inputs", lambda stages: 3)  # blocks
    kinds = {type(stage) for stage in RunStage(output=str(whole)).stages().values()}
    for stage in kinds:
        assert issubclass(stage, StageSettings)
        monkeypatch.setattr(stage, "work", lambda self, folder, progress: None)
    kinds_of_damage = list(REPLACED.values())
    for number, path in enumerate(sorted(path for path in whole.rglob("*") if path.is_file())):
        copy, content = tmp_path / "copy", kinds_of_damage[(2 * number + turn) % len(kinds_of_damage)]
        shutil.copytree(whole, copy)
        damaged = copy / path.relative_to(whole)
        if content is None:
            damaged.unlink()
        else:
            damaged.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == b"cut" else content)
        for words in (["report", str(copy)], kill.arguments_of("run", tmp_path, copy)):
            assert main(words) in (0, 2), damaged
            said = capsys.readouterr().err
            assert "Traceback" not in said
        shutil.rmtree(copy)
