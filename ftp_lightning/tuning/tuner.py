"""From measured prompts to a pruner: a recipe is chosen, cuts are climbed, the largest one that holds is confirmed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ftp_lightning.data.rows import Rows
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation import record
from ftp_lightning.evaluation.statistics import Interval
from ftp_lightning.fingerprint import code_version, digest
from ftp_lightning.models import model_identity
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.schedule import Schedule
from ftp_lightning.schedule_family import ScheduleFamily
from ftp_lightning.tuning.allowance import Allowance, OutOfTime
from ftp_lightning.tuning.measured import Measured
from ftp_lightning.tuning.promise import climb, step_down
from ftp_lightning.tuning.recipes import Ground, Recipe

if TYPE_CHECKING:
    from pandas import DataFrame

CHOICE_TIME = 0.4
"""Share of the time left by the answers after which the choice among recipes ends [ours]."""
SLACK = 0.1
"""A recipe is followed down to this much below the share to keep [ours]: one lost answer of 30 is 3 points."""


@dataclass(frozen=True)
class Rung:
    """One cut of a family, measured.

    Attributes:
        cut: FLOPs cut of the prefill as planned for a typical prompt.
        flops_cut: as realised on the prompts.
        budget: mean sparsity of the schedule.
        kept, first: share of whole answers, and of first tokens, that are the dense model's.
        kl: per token of the answers, nats.
        speed: time to first token, dense / pruned; None where it was not timed.
    """

    cut: float
    flops_cut: float
    budget: float
    kept: Interval
    first: Interval
    kl: float
    speed: Interval | None = None

    @classmethod
    def of(cls, cut: float, schedule: Schedule, items: DataFrame, speed: Interval | None = None) -> Rung:
        kept, first = record.kept(items), record.mean(items, "first")
        kl = record.mean(items, "kl").value or 0.0
        return cls(cut, record.flops_cut(items) or 0.0, schedule.budget, kept, first, kl, speed)


@dataclass(frozen=True)
class Candidate:
    """A recipe with what it fitted, its schedules by cut, and how they did on the choice prompts."""

    name: str
    pruner: TokenPruner
    schedules: dict[float, Schedule]
    curve: list[Rung]

    @property
    def merit(self) -> tuple[float, float]:
        """Kept answers added up over the cuts, then the KL: the greater the better."""
        return sum(rung.kept.value or 0.0 for rung in self.curve), -sum(rung.kl for rung in self.curve)

    def at(self, cut: float) -> TokenPruner:
        """The pruner of one cut, with the family of all of them."""
        return self.pruner.changed(schedule=self.schedules[cut], family=ScheduleFamily(list(self.schedules.values())))


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Attributes:
        chosen: the candidate. others: those it was preferred to. untried: names of recipes for which time was short.
        rungs: the chosen candidate on validation prompts, up to and with the first cut that fails.
        passed: how many of them hold. held_out: the confirmation, and the smaller cuts asked where it failed.
        left: how many cuts hold after it. timed_out: whether time ended the climb.
    """

    chosen: Candidate
    others: list[Candidate]
    untried: list[str]
    rungs: list[Rung]
    passed: int
    held_out: list[Rung]
    left: int
    timed_out: bool

    @property
    def confirmed(self) -> bool:
        return self.left == self.passed

    @property
    def pruner(self) -> TokenPruner:
        """The pruner of the largest cut that holds. Its compensation is for blocks that some schedule prunes."""
        found = self.chosen.at(self.rungs[self.left - 1].cut)
        if found.compensation is None or found.family is None:
            return found
        pruned = {block for one in found.family.schedules for block, s in enumerate(one.sparsity) if s > 0.0}
        return found.changed(compensation=found.compensation.only(sorted(pruned)), family=found.family)


class Tuner:
    """Carries a tuning out; everything measured lies in `measured.folder`, so that the same call goes on after a kill.

    Args:
        measured: of the model. parts: see `parts.split_rows`, with answers. keep: the share of answers to keep.
        cuts: FLOPs cuts to try, ascending. allowance: its time; saved by `note`, which is called between batches.
        tell: is told what is measured.
    """

    def __init__(
        self,
        measured: Measured,
        parts: dict[str, Rows],
        keep: float,
        cuts: Sequence[float],
        allowance: Allowance,
        seed: int = 0,
        tell: Callable[[str], None] = lambda what: None,
        note: Callable[[], None] = lambda: None,
    ):
        self.measured, self.parts, self.keep, self.cuts = measured, parts, keep, tuple(cuts)
        self.allowance, self.seed, self.tell, self.note = allowance, seed, tell, note
        every = [row.prompt for rows in parts.values() for row in rows.rows]
        allowance.answered = allowance.spent if allowance.answered is None else allowance.answered
        self.validating = (1 - CHOICE_TIME) * (allowance.seconds - allowance.answered)  # seconds that the choice leaves
        self.pace = 0.0  # seconds that a validation prompt takes, 0 until some are measured
        self.typical = sorted(every, key=len)[len(every) // 2]
        self.ground = Ground(measured.model, parts["fit"], round(statistics.fmean(map(len, every))), seed)

    def run(self, recipes: Sequence[Recipe]) -> Tuned:
        """The largest cut that holds, of the recipe that keeps most. UserError where no cut holds, or time is short."""
        try:
            return self._run(recipes)
        except OutOfTime:
            raise UserError(
                f"the {self.allowance.seconds / 60:g} minutes are over, and no cut is validated and confirmed yet\n"
                "Give more --minutes, with --overwrite where a run was interrupted: no answer is made twice."
            ) from None

    def _run(self, recipes: Sequence[Recipe]) -> Tuned:
        candidates, untried = self.candidates(recipes)
        best = max(candidates, key=lambda candidate: candidate.merit)
        rungs, passed, timed_out = self.validated(best)
        if not passed:
            raise UserError(_nothing(self.keep, rungs[0], "validation"))
        held_out: list[Rung] = []

        def confirm(number: int) -> Interval:
            held_out.append(self.rung(best, rungs[number].cut, "held_out"))
            return held_out[-1].kept

        left = step_down(confirm, passed, self.keep)
        if not left:
            raise UserError(_nothing(self.keep, held_out[-1], "held-out"))
        others = [one for one in candidates if one is not best]
        return Tuned(best, others, untried, rungs, passed, held_out, left, timed_out)

    def candidates(self, recipes: Sequence[Recipe]) -> tuple[list[Candidate], list[str]]:
        """The recipes on the choice prompts, and the names of those for which time was short.

        The first one is fitted however long that takes, and is not compared where there is no time for a second one.
        """
        found: list[Candidate] = []
        for place, recipe in enumerate(recipes):
            reserve = self.validating if found else 0.0
            try:
                candidate = self.fitted(recipe, reserve)
                if candidate.schedules and not found:
                    found.append(candidate)
                self.compare(candidate)
            except OutOfTime:
                if not found:
                    raise
                return found, [one.name for one in recipes[place:] if one.name != found[0].name]
            if candidate.schedules and candidate is not found[0]:
                found.append(candidate)
        if not found:
            raise UserError(
                f"no cut of {self.cuts[0]:.0%} can be made of prompts of {self.ground.length} tokens\n"
                "Give longer prompts, or smaller --cuts."
            )
        return found, []

    def fitted(self, recipe: Recipe, reserve: float) -> Candidate:
        """The candidate of a recipe. OutOfTime where fitting it would leave less than `reserve` seconds."""

        def between() -> None:
            self.note()
            self.allowance.check(reserve)
            self.tell(f"fitting {recipe.name}")

        pruner = self.prepared(recipe, between)
        return Candidate(recipe.name, pruner, recipe.schedules(self.ground, pruner, self.cuts), [])

    def compare(self, candidate: Candidate) -> None:
        """Add the candidate's curve on the choice prompts, as far as it is worth following."""
        for cut in candidate.schedules:
            candidate.curve.append(self.rung(candidate, cut, "choice", lambda: self.validating))
            if (candidate.curve[-1].kept.value or 0.0) < self.keep - SLACK:
                break

    def validated(self, candidate: Candidate) -> tuple[list[Rung], int, bool]:
        """The candidate's cuts on validation prompts, from the smallest up; how many hold; whether time ended it."""
        rungs: list[Rung] = []
        cuts, took, self.pace = list(candidate.schedules), [0.0], 0.0

        def confirming() -> float:
            return self.pace * len(self.parts["held_out"]) if rungs else 0.0

        def measure(number: int) -> Interval:
            started = time.monotonic()
            rungs.append(self.rung(candidate, cuts[number], "validation", confirming, timed=True))
            took.append(time.monotonic() - started)
            return rungs[-1].kept

        def go_on() -> bool:
            return self.allowance.left >= max(took) + confirming()

        try:
            passed = climb(measure, len(cuts), self.keep, go_on)
        except OutOfTime:
            if not rungs:
                raise
            passed = len(rungs)  # all of them hold: the first that fails would have ended the climb
        return rungs, passed, len(rungs) == passed < len(cuts)

    def rung(
        self,
        candidate: Candidate,
        cut: float,
        part: str,
        reserve: Callable[[], float] = lambda: 0.0,
        timed: bool = False,
    ) -> Rung:
        """One cut of a candidate on one part of the prompts. OutOfTime where it would leave less than `reserve` s."""
        pruner, what = candidate.at(cut), f"{candidate.name}, cut of {cut:.0%}, {part.replace('_', '-')} prompts"
        rows, before = self.parts[part], self.pace
        looks: list[tuple[float, int]] = []

        def between(done: int, of: int) -> None:
            looks.append((time.monotonic(), done))
            self.pace = before or _pace(looks[1:])  # the first batch may be slow
            self.note()
            self.allowance.check(reserve())
            self.tell(f"{what}, {done} of {of}")

        items = self.measured.items(candidate.name, pruner, rows, between)
        self.pace = max(before, _pace([*looks, (time.monotonic(), len(rows))]))
        speed = self.measured.speed(pruner, self.typical, self.seed).ratio if timed else None
        self.note()
        return Rung.of(cut, candidate.schedules[cut], items, speed)

    def prepared(self, recipe: Recipe, between: Callable[[], None] = lambda: None) -> TokenPruner:
        """What a recipe fits, from disk where that is done; `between` is called between the batches of a fit."""
        about = (str(model_identity(self.ground.model)), str(self.ground.model.dtype), self.ground.rows.hash())
        who = (recipe.name, json.dumps(recipe.identity, sort_keys=True))
        key = digest(*(str(part).encode() for part in (*about, *who, self.seed, code_version())))
        place = Path(self.measured.folder) / f"recipe-{key}"
        if not place.exists():
            between()
            ground = replace(self.ground, folder=place.with_suffix(".training"), between=between)
            recipe.fit(ground).save(place)
            self.note()
        return TokenPruner.load(place)


def _pace(looks: Sequence[tuple[float, int]]) -> float:
    """Seconds per prompt from the first to the last of these (time, prompts done); 0 where nothing was done."""
    done = looks[-1][1] - looks[0][1] if looks else 0
    return (looks[-1][0] - looks[0][0]) / done if done else 0.0


def _nothing(keep: float, rung: Rung, part: str) -> str:
    value, low, high = (end or 0.0 for end in (rung.kept.value, rung.kept.low, rung.kept.high))
    wanted = f"{100 * keep:.4g} %"
    less = f"--keep {int(1000 * low) / 1000:g} or less" if low > 0.5 else "a lower --keep"
    return (
        f"no cut keeps {wanted} of the answers: {rung.cut:.0%}, the smallest that was tried, keeps {value:.1%} "
        f"({low:.1%} to {high:.1%}) of {rung.kept.items} {part} answers\nGive {less}, smaller --cuts, or more prompts."
    )
