"""Signals that ask a run to stop: it leaves with 128 + n within seconds, and its workers with it.

What is on disk is whole at every moment, so leaving needs no work but to let go. Training is the exception: it saves at
the end of its step. A second signal leaves at once.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
PATIENCE = 4.0
"""Seconds after which a run that is still there is ended, whatever it is in the middle of [ours]."""
SAME = 0.3
"""Seconds within which a second signal is the first one told twice, as `timeout` and terminals do [ours]."""
RESUME = "Interrupted. Run the same command again to resume."
_KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Stopped(SystemExit):
    """A signal has come. It passes all that catches errors, as SystemExit does; its code is 128 + the signal."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


class _Watch(threading.Thread):
    """Reads what the interpreter writes of every signal, also while the main thread is inside of a library."""

    def __init__(self) -> None:
        super().__init__(name="stopping", daemon=True)
        self.told, self.telling = socket.socketpair()
        self.telling.setblocking(False)
        self.came: int | None = None
        self.raised: int | None = None
        self.since = 0.0
        self.lost, self.echoes = False, 0

    def run(self) -> None:
        while (numbers := self._heard()) is not None:
            for number in numbers:
                if self.echoes:
                    self.echoes -= 1
                elif self.came is None:
                    self.came, self.since = number, time.monotonic()
                elif is_second(self.since):
                    leave_now(number)
            if self.lost:
                self._raise_again()
            if self.came is not None and not _unhurried and time.monotonic() - max(self.since, _hurried_at) > PATIENCE:
                leave_now(self.came)

    def _raise_again(self) -> None:
        """The main thread was in a callback whose errors Python ignores; a moment later it has left that, and may be
        waiting inside a library, from which a signal alone wakes it."""
        time.sleep(0.02)
        self.lost = False
        if _watch is self and (number := self.raised or self.came) is not None:
            self.raised, self.echoes = None, self.echoes + 1
            signal.pthread_kill(threading.main_thread().ident or 0, number)

    def unraisable(self, before: Callable[[Any], Any], told: Any) -> None:
        """Stands for `sys.unraisablehook`, which is told of errors in `__del__` and in callbacks of weak references."""
        if not isinstance(told.exc_value, Stopped):
            before(told)
            return
        self.lost = True
        with suppress(OSError):
            self.telling.send(b"\0")

    def _heard(self) -> list[int] | None:
        """The signals that have come, perhaps none; None where nobody listens any more. Looks again every 0.1 s once
        one has come."""
        self.told.settimeout(None if self.came is None else 0.1)
        try:
            found = self.told.recv(64)
        except TimeoutError:
            return []
        except OSError:
            return None
        return [number for number in found if number in SIGNALS] if found else None


_unhurried, _hurried_at = 0, 0.0
_watch: _Watch | None = None


@contextmanager
def heeding() -> Iterator[None]:
    """Inside, the first of SIGNALS raises `Stopped` in the main thread, and the second ends the process at once.

    SIGINT is heard although a shell has started the process in the background, and all although whoever started it had
    them blocked; SIGHUP is not under `nohup`. All is put back afterwards. Outside of the main thread it does nothing.
    """
    global _watch
    if threading.current_thread() is not threading.main_thread() or _watch is not None:
        yield
        return
    watch = _Watch()
    watch.start()
    _watch = watch
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    before_hook, sys.unraisablehook = sys.unraisablehook, partial(watch.unraisable, sys.unraisablehook)
    before_fd = signal.set_wakeup_fd(watch.telling.fileno(), warn_on_full_buffer=False)
    try:
        for number in SIGNALS:
            if number != signal.SIGHUP or before[number] != signal.SIG_IGN:
                signal.signal(number, _stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        yield
    finally:
        _watch = None
        signal.set_wakeup_fd(before_fd)
        if watch.is_alive():  # a forked process has no watch, but the same socket, and may hold it open
            watch.telling.shutdown(socket.SHUT_RDWR)
        watch.telling.close()
        watch.join()  # else it could send a signal again that nobody heeds any more
        put_back(before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        sys.unraisablehook = before_hook


def put_back(handlers: dict[int, Any]) -> None:
    """Set the handlers that `signal.getsignal` gave; those that Python did not set stay."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


def may_replace(number: int) -> bool:
    """Whether nobody but us hears this signal, as far as Python knows."""
    return signal.getsignal(number) in (_stop, signal.SIG_DFL, signal.default_int_handler)


def is_second(first: float) -> bool:
    """Whether a signal that comes now is another one than that which came at `first` (`time.monotonic`)."""
    return time.monotonic() - first > SAME


def stopped_by() -> int | None:
    """The signal that has raised `Stopped` since `heeding` began; None where none has."""
    return None if _watch is None else _watch.raised


def _stop(number: int, frame: FrameType | None) -> None:
    """Raises once: what is done while the process leaves is not disturbed."""
    if _watch is not None and _watch.raised is None:
        _watch.raised = number
        raise Stopped(number)


@contextmanager
def unhurried() -> Iterator[None]:
    """Inside, leaving may take its time: a step of training is finished first. A second signal still leaves at once."""
    global _unhurried, _hurried_at
    _unhurried += 1
    try:
        yield
    finally:
        _unhurried -= 1
        _hurried_at = time.monotonic()


def leave_now(number: int) -> None:
    """End this process and those it has started, whatever they are in the middle of."""
    for child in multiprocessing.active_children():
        child.kill()
    with suppress(OSError):
        os.write(2, f"\n{RESUME}\n".encode())
    os._exit(128 + number)


def stop_workers() -> None:
    """Ask the processes that this one has started to stop: those that train leave after their step."""
    for child in multiprocessing.active_children():
        child.terminate()


def await_workers() -> None:
    """Wait until the processes that this one has started have ended, so that its locks are freed last."""
    with unhurried():
        for child in multiprocessing.active_children():
            child.join()


def end_with_parent() -> None:
    """Have this worker killed when the process that started it ends, however that ends: by the kernel on Linux, and
    elsewhere by looking once a second."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch_parent, args=(parent.pid,), daemon=True).start()


def _watch_parent(parent: int | None) -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)  # it holds as long as this thread lives
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
