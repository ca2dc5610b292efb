"""The time that a tuning may take, and how many prompts it allows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from ftp_lightning.tuning.parts import SHARES

CUTS = 3
"""Cuts of one recipe that the shortest tuning worth the name measures [ours]."""
FILLED = 0.75
"""Share of the time that the shortest tuning may be planned to take [ours]: the rest is for more recipes and cuts, and
for an estimate that was too low."""


class OutOfTime(Exception):
    """The time of a tuning is over."""


@dataclass
class Allowance:
    """The time that a tuning may take, in seconds.

    Attributes:
        before: what was spent before an interruption.
        answered: what was spent when the model had answered all prompts; None before.
    """

    seconds: float
    before: float = 0.0
    started: float = field(default_factory=lambda: time.monotonic())
    answered: float | None = None

    @property
    def spent(self) -> float:
        return self.before + time.monotonic() - self.started

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    def check(self, reserve: float = 0.0) -> None:
        """OutOfTime where fewer than `reserve` seconds are left."""
        if self.left < reserve:
            raise OutOfTime


def needed(asked: Sequence[bool], answer: float, prefill: float) -> list[float]:
    """The seconds that the shortest tuning takes with the first 1, 2, ... of these prompts.

    It fits one recipe, which costs as much as a prefill of each prompt, and measures `CUTS` of its cuts and the dense
    model beside them; then one cut is confirmed.

    Args:
        asked: whether the model must still be asked for the answer to a prompt.
        answer, prefill: seconds of the answer to one prompt, and of its prefill.
    """
    measured = (1 + CUTS) * (SHARES["choice"] + SHARES["validation"]) + 2 * SHARES["held_out"]
    work = prefill * (SHARES["fit"] + measured)
    return list(accumulate(answer * missing + work for missing in asked))


def affordable(seconds: Sequence[float], allowed: float) -> int:
    """How many prompts may be used, by what `needed` says and the seconds that are allowed."""
    return sum(one <= FILLED * allowed for one in seconds)
