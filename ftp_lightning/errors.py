"""The errors that speak to the user."""

from __future__ import annotations

import errno
from pathlib import Path
from traceback import walk_tb

_REMEDIES = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some of your quota",
    errno.EFBIG: "Raise the limit of a file's size (`ulimit -f`)",
    errno.EROFS: "Mount the disk so that it can be written to",
    errno.EACCES: "Change the permissions",
    errno.EPERM: "Change the permissions",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "Close some files on this machine",
    errno.ENOMEM: "Free some memory",
    errno.EIO: "Look at the disk",
    errno.ESTALE: "Look at the network file system",
    errno.ENOENT: "Put it back",
}


_STARTING = ("subprocess", "multiprocessing", "threading")
"""Modules whose EAGAIN means that no process may start; elsewhere it may be that of a pipe that is full."""


class UserError(ValueError):
    """What is wrong, where, and what to do, in at most three lines.

    The command line prints the message on stderr and exits with status 2; a library user sees a ValueError.
    """


class Interrupted(UserError):
    """A UserError that the settings are not to blame for: what was saved stays, and the same command goes on with it
    once the cause is gone."""


def hub_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """The errors of the Hub's client, its own and the base class of its HTTP library, and `more`.

    The client passes on the errors of its HTTP library, which differs by version: so the class is found through it.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    library = tuple(kind for kind in HfHubHTTPError.__bases__ if kind is not OSError)
    return (*more, HFValidationError, HfHubHTTPError, *library)


def file_error(error: BaseException | None) -> Interrupted | None:
    """What to say where the system could not read or write a file: the path, the reason, the remedy. None for any
    error that did not come from the system."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    where = f" {error.filename}" if error.filename else ""
    remedy = _REMEDIES.get(error.errno, "Look at the file and its folder")
    return Interrupted(f"cannot read or write{where}: {error.strerror}\n{remedy}, then run the same command to resume.")


def machine_error(error: BaseException) -> UserError | None:
    """What to say of an error that the machine or the environment is to blame for, wherever it arose. None for others.

    No further thread or process may start; package data that `importlib.metadata` cannot read; else `file_error`.
    """
    if _is_of_threads(error):
        return Interrupted(
            "no further process or thread may start here\n"
            "Raise the limit (`ulimit -u`), or end some processes; then run the same command to resume."
        )
    if (told := file_error(error)) is None and (folder := _broken_package(error)) is not None:
        return UserError(f"package data in {folder} cannot be read: {error}\nInstall the package again.")
    return told


def _is_of_threads(error: BaseException) -> bool:
    """The error of Python, of fork, or of a library written in Rust, whose class no module names."""
    if isinstance(error, OSError):
        return error.errno == errno.EAGAIN and any(name in _STARTING for name in _passed(error))
    return "can't start new thread" in str(error) or "ThreadPoolBuildError" in str(error)


def _passed(error: BaseException) -> set[str]:
    """Top-level names of the modules that the error came through."""
    return {str(frame.f_globals.get("__name__")).split(".")[0] for frame, _ in walk_tb(error.__traceback__)}


def _broken_package(error: BaseException) -> Path | None:
    """The `dist-info` folder that could not be read."""
    if not isinstance(error, Exception):
        return None
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") == "importlib.metadata":
            read = getattr(frame.f_locals.get("self"), "_path", None)
            if isinstance(read, Path):
                return read
    return None
