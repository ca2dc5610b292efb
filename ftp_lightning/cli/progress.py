"""Progress of a stage on the terminal: what is done, how far it is, and how long it still takes."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

EVERY = 10.0
"""Seconds between two lines where the output is no terminal [ours]."""


def clock(seconds: float) -> str:
    """ "42 s", "3 min 05 s" or "2 h 07 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def say(text: str, end: str = "\n") -> None:
    """Print a result. Letters that the terminal cannot show are replaced: what was found is on disk already."""
    print(_shown(text, sys.stdout), end=end, flush=True)


def _shown(text: str, stream: TextIO) -> str:
    coding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(coding, "replace").decode(coding)


class Progress:
    """Progress of one stage: a bar of rich on a terminal, a line every ten seconds otherwise.

    `before` and `share`: which part of a whole chain lay before this stage and which part it is (both in [0, 1]);
    from them and the chain's start the time left for all of it is estimated.

    Attributes:
        finished_before: the part of the chain that an earlier command had finished: it took no time now.
        after: seconds of what follows the chain, whatever the model is.
        idle: whether this stage was finished before.
    """

    def __init__(
        self,
        label: str,
        before: float = 0.0,
        share: float = 1.0,
        started: float | None = None,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
        finished_before: float = 0.0,
        after: float = 0.0,
    ):
        self.label, self.before, self.share = label, before, share
        self.finished_before, self.after, self.idle = finished_before, after, False
        self.stream, self.now = stream or sys.stderr, now
        self.started = now() if started is None else started
        self._last_shown = -float("inf")
        self._bar: Bar | None = None

    def place(self) -> dict:
        """What another process needs to continue this progress: `Progress(**place)`."""
        names = ("label", "before", "share", "started", "finished_before", "after")
        return {name: getattr(self, name) for name in names}

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._close()
        print(_shown(f"{self.label}: {text}", self.stream), file=self.stream, flush=True)

    def done_already(self, text: str) -> None:
        """Print that an earlier command has finished this stage."""
        self.idle = True
        self.say(text)

    def step(self, done: float, total: float, what: str, at_most: float | None = None) -> None:
        """Show that `done` of `total` steps are done; `what` names the current one.

        at_most: seconds that are left where a stage may end sooner; else they are estimated from the steps.
        """
        now, terminal = self.now(), self.stream.isatty()
        if now - self._last_shown < (0.2 if terminal else EVERY):
            return
        self._last_shown = now
        fraction = min(1.0, done / max(total, 1e-9))
        left = self._left(now, fraction) if at_most is None else max(0.0, at_most)
        text = f"{self.label}: {what}, {clock(now - self.started)}"
        text += "" if left is None else f", {'about' if at_most is None else 'at most'} {clock(left)} left"
        if terminal:
            self._draw(text, self.before + self.share * fraction)
        else:
            print(_shown(text, self.stream), file=self.stream, flush=True)

    def done(self, text: str) -> None:
        """Print the last line of the stage, with the time it took."""
        self.say(f"{text} ({clock(self.now() - self.started)})")

    def _left(self, now: float, fraction: float) -> float | None:
        """Seconds left; None as long as too little is done to tell."""
        elapsed, part = now - self.started, self.before + self.share * fraction
        done = part - self.finished_before
        return elapsed * (1 - part) / done + self.after if done > 0.01 and elapsed > 1 else None

    def _draw(self, text: str, part: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        if self._bar is None:
            columns, console = (
                (TextColumn("{task.description}", markup=False), BarColumn(20)),
                Console(file=self.stream),
            )
            self._bar = Bar(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
            self._bar.add_task("", total=1.0)
            self._bar.start()
            console.show_cursor(True)  # a killed process must not leave the terminal without one
            atexit.register(self._close)
        self._bar.update(self._bar.task_ids[0], description=text, completed=part)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            atexit.unregister(self._close)
