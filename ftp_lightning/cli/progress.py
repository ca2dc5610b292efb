"""Progress on the terminal: what, how far, how long still."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO


def clock(seconds: float) -> str:
    """ "42 s", "3 min 05 s" or "2 h 07 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class Progress:
    """Lines about one stage: redrawn in place on a terminal, every ten seconds otherwise.

    `before` and `share`: which part of a whole chain lay before this stage and which part it is (both in [0, 1]);
    from them and the chain's start the time left for all of it is estimated.
    """

    def __init__(
        self,
        label: str,
        before: float = 0.0,
        share: float = 1.0,
        started: float | None = None,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        self.label, self.before, self.share = label, before, share
        self.stream, self.now = stream or sys.stderr, now
        self.started = now() if started is None else started
        self._last_shown, self._drawn = -float("inf"), 0

    def place(self) -> dict:
        """What another process needs to go on telling: `Progress(**place)`."""
        return {"label": self.label, "before": self.before, "share": self.share, "started": self.started}

    def say(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        print(f"{self.label}: {text}", file=self.stream, flush=True)

    def step(self, done: float, total: float, what: str) -> None:
        """`done` of `total` steps; `what` says of what."""
        now, terminal = self.now(), self.stream.isatty()
        if now - self._last_shown < (0.2 if terminal else 10.0):
            return
        self._last_shown = now
        line = f"{self.label}: {what}, {self._time(now, done / max(total, 1e-9))}"
        if not terminal:
            print(line, file=self.stream, flush=True)
            return
        self._clear()
        self._drawn = len(line)
        self.stream.write(line)
        self.stream.flush()

    def done(self, text: str) -> None:
        """The stage has ended."""
        self.say(f"{text} ({clock(self.now() - self.started)})")

    def _time(self, now: float, fraction: float) -> str:
        elapsed, part = now - self.started, self.before + self.share * min(1.0, fraction)
        left = f", about {clock(elapsed * (1 - part) / part)} left" if part > 0.01 and elapsed > 1 else ""
        return f"{clock(elapsed)}{left}"

    def _clear(self) -> None:
        if self._drawn:
            self.stream.write("\r" + " " * self._drawn + "\r")
            self._drawn = 0
