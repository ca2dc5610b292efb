"""Errors that the machine or the environment is to blame for end in a sentence, wherever they arise."""

import errno
import importlib.metadata
import threading

import pytest

from ftp_lightning import __main__ as command_line
from ftp_lightning.fingerprint import version_of


class Panic(BaseException):
    """As a library in Rust raises it."""


def refuse(error: BaseException):
    def raising(*_, **__):
        raise error

    return raising


THREADS = [
    RuntimeError("can't start new thread"),
    BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
    Panic("The global thread pool has not been initialized.: ThreadPoolBuildError { kind: IOError(Os { code: 11 }) }"),
]


@pytest.mark.parametrize("error", THREADS, ids=lambda error: type(error).__name__)
def test_a_limit_on_processes_is_told_in_a_sentence(error, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "_run", refuse(error))
    assert command_line.main(["doctor"]) == 2
    assert "no further process or thread may start" in capsys.readouterr().err


def test_it_is_told_where_not_even_signals_can_be_heeded(monkeypatch, capsys):
    monkeypatch.setattr(threading.Thread, "start", refuse(RuntimeError("can't start new thread")))
    assert command_line.main(["doctor"]) == 2
    assert "no further process or thread may start" in capsys.readouterr().err
    monkeypatch.undo()
    assert command_line.main(["--version"]) == 0  # nothing of the failed start is left


@pytest.fixture
def broken(tmp_path, monkeypatch):
    folder = tmp_path / "broken_thing-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_bytes(b"\xa1\xff")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_package_data_that_cannot_be_read_are_named(broken, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "_run", lambda _: importlib.metadata.version("broken_thing"))
    assert command_line.main(["doctor"]) == 2
    assert f"package data in {broken} cannot be read" in capsys.readouterr().err


def test_a_version_that_cannot_be_read_ends_no_run(broken):
    assert version_of("broken_thing") is None


@pytest.mark.parametrize("error", [RuntimeError("a fault of ours"), ValueError("another"), Panic("third")])
def test_our_own_faults_keep_their_traceback(error, monkeypatch):
    monkeypatch.setattr(command_line, "_run", refuse(error))
    with pytest.raises(type(error), match=str(error)):
        command_line.main(["doctor"])
