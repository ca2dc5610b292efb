"""One process at a time at work in a folder, by a file that the kernel unlocks when its holder dies."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ftp_lightning.errors import UserError, file_error


class Lock:
    """One run at a time in a folder: a file that the kernel unlocks when its holder dies, by whatever death."""

    def __init__(self, path: Path):
        self.path = path
        self.file: int | None = None

    def take(self, wait: bool = False) -> bool:
        """False where another holds it; with `wait` that one is waited for. True also on a file system without locks:
        there is none to respect [ours]. UserError where the path is no file that can be opened."""
        while True:
            self.file = self._opened()
            try:
                import fcntl

                fcntl.flock(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                self._close()
                return False
            except (OSError, ImportError):
                return True
            if self._is_there():
                return True
            self._close()  # its holder has taken it away between our opening and our locking

    def free(self) -> None:
        """Let go; a file that cannot be removed just now stays, which locks nobody out."""
        if self.file is not None:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
            self._close()

    def _opened(self) -> int:
        """The descriptor of the lock's file, which is made where it is not there; a pipe is not waited for."""
        try:
            found = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise file_error(error) or error from None
        if not stat.S_ISREG(os.fstat(found).st_mode):
            os.close(found)
            raise UserError(f"{self.path} is not a file, but the lock of this folder has that name\nRemove it.")
        return found

    def _is_there(self) -> bool:
        """Whether the file that was opened still lies where others look for it."""
        assert self.file is not None
        try:
            return os.path.samestat(os.fstat(self.file), self.path.stat())
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        assert self.file is not None
        os.close(self.file)
        self.file = None


@contextmanager
def locked(place: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """One process at a time at work on `place`, machine-wide; others wait, and a process that dies lets go.

    `waiting` is called about once a second meanwhile; where it raises, the wait is over.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error(error) or error from None
    lock = Lock(place.parent / f".{place.name}.lock")
    if waiting is None:
        lock.take(wait=True)
    else:
        while not lock.take():
            waiting()
            time.sleep(1)
    try:
        yield
    finally:
        lock.free()
