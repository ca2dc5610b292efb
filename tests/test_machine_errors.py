"""Errors that the machine or the environment is to blame for end in a sentence, wherever they arise."""

import errno
import importlib.metadata
import multiprocessing
import os
import socket
import threading
from pathlib import Path

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
    Panic("The global thread pool has not been initialized.: ThreadPoolBuildError { kind: IOError(Os { code: 11 }) }"),
]


@pytest.mark.parametrize("error", THREADS, ids=lambda error: type(error).__name__)
def test_a_limit_on_processes_is_told_in_a_sentence(error, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "_run", refuse(error))
    assert command_line.main(["doctor"]) == 2
    assert "no further process or thread may start" in capsys.readouterr().err


AGAIN = BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


def test_a_process_that_may_not_be_forked_is_told_but_a_full_pipe_is_none(monkeypatch, capsys):
    monkeypatch.setattr(os, "fork", refuse(AGAIN))
    monkeypatch.setattr(command_line, "_run", lambda _: multiprocessing.get_context("fork").Process().start())
    assert command_line.main(["doctor"]) == 2
    assert "no further process or thread may start" in capsys.readouterr().err
    monkeypatch.setattr(command_line, "_run", refuse(AGAIN.with_traceback(None)))
    assert command_line.main(["doctor"]) == 2
    assert "no further process" not in capsys.readouterr().err


def test_it_is_told_where_no_socket_can_be_had(monkeypatch, capsys):
    monkeypatch.setattr(socket, "socketpair", refuse(OSError(errno.EMFILE, "Too many open files")))
    assert command_line.main(["doctor"]) == 2
    assert "`ulimit -n`" in capsys.readouterr().err


def test_a_system_error_while_package_data_are_read_keeps_its_remedy(broken, monkeypatch, capsys):
    monkeypatch.setattr(Path, "read_text", refuse(OSError(errno.EMFILE, "Too many open files")))
    monkeypatch.setattr(command_line, "_run", lambda _: importlib.metadata.version("broken_thing"))
    assert command_line.main(["doctor"]) == 2
    assert "`ulimit -n`" in capsys.readouterr().err


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
