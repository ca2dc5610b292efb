"""`--minutes` of a tuning: it bounds the answers, the fits and the measurements, whatever takes long."""

import json
import time
from types import SimpleNamespace

import pytest
from test_cli import TINY
from test_tune_stage import failed

from ftp_lightning import StaticRouter, TokenPruner
from ftp_lightning.data.rows import Row, Rows
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation import own_answers
from ftp_lightning.evaluation.record import record
from ftp_lightning.models import load
from ftp_lightning.schedule import Schedule
from ftp_lightning.tuning import allowance, recipes, tuner
from ftp_lightning.tuning.allowance import Allowance, affordable, needed
from ftp_lightning.tuning.recipes import Recipe, each
from ftp_lightning.tuning.tuner import Tuner

PARTS = {"fit": 6, "choice": 8, "validation": 24, "held_out": 8}
CUTS = (0.1, 0.2, 0.3, 0.4)
BATCH = 4


class Clock:
    """A clock that only work moves; `longest` is the longest step between two looks at it."""

    def __init__(self, now: float = 0.0):
        self.now, self.longest = now, 0.0

    def monotonic(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.longest = max(self.longest, seconds)


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    for module in (allowance, tuner):
        monkeypatch.setattr(module, "time", found)
    return found


class Counted:
    """Stands for `Measured`: every batch takes `seconds`; answers are kept up to the cut `lasting`."""

    def __init__(self, clock, folder, seconds, lasting=0.3):
        self.model, self.folder, self.clock, self.seconds, self.lasting = (
            load("embedded")[0],
            folder,
            clock,
            seconds,
            lasting,
        )

    def items(self, name, pruner, rows, tell):
        for done in range(0, len(rows), BATCH):
            tell(done, len(rows))
            self.clock.work(self.seconds)
        right = pruner.scheduled.budget <= self.lasting
        about = {"right": right, "first": right, "kl": 0.1, "flops": 1.0 - pruner.scheduled.budget, "dense_flops": 1.0}
        found = [{**about, "document": place} for place in range(len(rows))]
        return record(found, name, "own answers").assign(needed=True)

    def speed(self, pruner, prompt, seed):
        self.clock.work(self.seconds / 2)
        return SimpleNamespace(ratio=None)


def recipe_of(name, clock, steps, seconds):
    """A recipe that fits in `steps` steps."""

    def fit(ground):
        for _ in range(steps):
            ground.between()
            clock.work(seconds)
        return TokenPruner(StaticRouter(), Schedule.uniform(ground.blocks, 0.0))

    return Recipe(name, fit, each(lambda ground, cut: Schedule.uniform(ground.blocks, cut)))


def tuned(clock, folder, minutes, fits, seconds=5.0):
    """A tuning whose recipes take `fits` steps of 7 seconds to fit, after 60 seconds of answers."""
    start = Allowance(60 * minutes)
    clock.work(60.0)
    clock.longest = 0.0
    parts = {
        name: Rows([Row([1, 2, 3], [4], "plain", place) for place in range(count)]) for name, count in PARTS.items()
    }
    tuning = Tuner(Counted(clock, folder, seconds), parts, 0.8, CUTS, start)
    found = tuning.run([recipe_of(f"recipe {number}", clock, steps, 7.0) for number, steps in enumerate(fits)])
    return found, start


@pytest.mark.parametrize("fits", [(0, 0), (3, 40), (40, 3), (1, 1, 1, 1), (0, 500, 0)])
@pytest.mark.parametrize("minutes", [1.2, 2, 3, 4, 5, 7, 9, 30])
def test_no_more_than_a_step_is_done_when_the_time_is_over(clock, tmp_path, minutes, fits):
    try:
        found, start = tuned(clock, tmp_path, minutes, fits)
    except UserError as error:
        assert f"the {minutes:g} minutes are over" in str(error) and minutes < 10
        assert 60 * minutes - 60 <= clock.now  # not long before
    else:
        assert found.confirmed and found.rungs[found.left - 1].cut <= 0.3
    assert clock.now <= 60 * minutes + clock.longest


def test_with_time_enough_all_recipes_are_compared(clock, tmp_path):
    found, _ = tuned(clock, tmp_path, 60, (3, 3, 3))
    assert found.untried == [] and len(found.others) == 2 and not found.timed_out
    assert found.rungs[found.left - 1].cut == 0.3 and found.rungs[-1].cut == 0.4


def test_a_fit_that_takes_too_long_is_given_up(clock, tmp_path):
    found, _ = tuned(clock, tmp_path, 10, (1, 500, 1))
    assert found.chosen.name == "recipe 0" and found.untried == ["recipe 1", "recipe 2"]
    assert found.rungs[found.left - 1].cut == 0.3


def test_a_first_recipe_that_leaves_no_time_to_compare_is_validated_at_once(clock, tmp_path):
    found, _ = tuned(clock, tmp_path, 10, (40, 1))
    assert found.chosen.name == "recipe 0" and found.untried == ["recipe 1"] and found.chosen.curve == []


def test_a_recipe_is_fitted_without_a_clock(clock, tmp_path):
    """As experiments do that compare recipes."""
    rows = {name: Rows([Row([1, 2, 3], [4], "plain", 0)]) for name in PARTS}
    tuning = Tuner(Counted(clock, tmp_path, 5.0), rows, 0.8, CUTS, Allowance(0.0))
    assert tuning.prepared(recipe_of("slow", clock, 3, 7.0)).scheduled.budget == 0.0 and clock.now == 21.0


def test_the_time_before_an_interruption_counts(clock):
    start = Allowance(100.0, before=70.0)
    clock.work(20.0)
    start.check(reserve=10.0)
    with pytest.raises(allowance.OutOfTime):
        start.check(reserve=10.1)
    clock.work(10.1)
    with pytest.raises(allowance.OutOfTime):
        start.check()


def rows_of(count):
    return Rows([Row([1, 2, 3], [4], "plain", place) for place in range(count)])


def test_an_interruption_does_not_prolong_the_choice(clock, tmp_path):
    """It ends after 40 % of what the answers left, however often the command was begun."""
    parts, measured = {name: rows_of(count) for name, count in PARTS.items()}, Counted(clock, tmp_path, 5.0)
    first = Allowance(600.0)
    clock.work(100.0)  # answers
    assert Tuner(measured, parts, 0.8, CUTS, first).validating == pytest.approx(0.6 * 500.0)
    clock.work(150.0)
    again = Allowance(600.0, before=first.spent, answered=first.answered)
    assert Tuner(measured, parts, 0.8, CUTS, again).validating == pytest.approx(0.6 * 500.0)


class Remembered(Counted):
    """As `Counted`, and what was measured before takes no time: all choice prompts, and the smallest cut."""

    def items(self, name, pruner, rows, tell):
        known = len(rows) == 4 or pruner.scheduled.budget < 0.15
        now, tell = self.clock.now, (lambda done, of: None) if known else tell
        found = super().items(name, pruner, rows, tell)
        self.clock.now = now if known else self.clock.now
        return found


def test_what_is_measured_already_does_not_hide_how_long_the_confirmation_takes(clock, tmp_path):
    parts = {name: rows_of(count) for name, count in (PARTS | {"choice": 4}).items()}
    tuning = Tuner(Remembered(clock, tmp_path, 5.0), parts, 0.8, CUTS, Allowance(35.0))
    found = tuning.run([recipe_of("quick", clock, 0, 7.0)])
    assert found.confirmed and [rung.cut for rung in found.rungs] == [0.1] and found.timed_out


def test_recipes_compared_before_an_interruption_are_compared_again(clock, tmp_path):
    """Although the time for the choice is over: they lie on disk, and the same recipe must be chosen."""
    parts = {name: rows_of(count) for name, count in (PARTS | {"choice": 4}).items()}
    recipes = [recipe_of(name, clock, 1, 7.0) for name in ("one", "two")]
    first = Allowance(600.0)
    Tuner(Counted(clock, tmp_path, 5.0), parts, 0.8, CUTS, first).candidates(recipes)
    again = Allowance(600.0, before=400.0, answered=first.answered)
    more = [*recipes, recipe_of("never begun", clock, 1, 7.0)]
    found, untried = Tuner(Remembered(clock, tmp_path, 5.0), parts, 0.8, CUTS, again).candidates(more)
    assert [one.name for one in found] == ["one", "two"] and untried == ["never begun"]


def test_the_time_is_noted_before_each_batch(clock, tmp_path):
    """So that a kill in the midst of a long fit or measurement does not give its time back."""
    noted = []
    parts = {name: rows_of(count) for name, count in PARTS.items()}
    tuning = Tuner(
        Counted(clock, tmp_path, 5.0), parts, 0.8, CUTS, Allowance(600.0), note=lambda: noted.append(clock.now)
    )
    tuning.run([recipe_of("one", clock, 2, 7.0)])
    assert noted[:5] == [0.0, 0.0, 7.0, 14.0, 14.0] and 19.0 in noted


def test_prompts_that_the_time_allows():
    """Of 100 prompts 15 fit and 15 choose, 50 validate and 20 confirm: three cuts and the dense model, then one."""
    prefills = 15 + 4 * 15 + 4 * 50 + 2 * 20
    seconds = needed([True] * 100, answer=3.0, prefill=2.0)
    assert seconds[-1] == pytest.approx(100 * 3.0 + 2.0 * prefills) and len(seconds) == 100
    assert (
        affordable(seconds, 1.001 * seconds[-1] / 0.75) == 100 and affordable(seconds, 0.505 * seconds[-1] / 0.75) == 50
    )
    assert affordable(seconds, 0.0) == 0
    known = needed([False] * 60 + [True] * 40, answer=3.0, prefill=2.0)
    assert known[59] == pytest.approx(0.6 * 2.0 * prefills) and seconds[-1] - known[-1] == pytest.approx(60 * 3.0)


SMALL = [*TINY, "--prompts", "embedded", "--prompt_tokens", 32, "--continuation_tokens", 4, "--limit", 60]


@pytest.fixture
def ten_seconds_a_prompt(monkeypatch):
    """The clock of the estimate, moved by each answer; one recipe that fits nothing."""
    from ftp_lightning.stages import tune

    clock, real = Clock(time.monotonic()), own_answers.greedy

    def greedy(model, batch, new_tokens, ends):
        clock.work(len(batch["input_ids"]) * (1.0 if new_tokens == 1 else 10.0))
        return real(model, batch, new_tokens, ends)

    monkeypatch.setattr(tune, "time", clock)
    monkeypatch.setattr(allowance, "time", clock)
    monkeypatch.setattr(own_answers, "greedy", greedy)
    monkeypatch.setattr(recipes, "RECIPES", tuple(one for one in recipes.RECIPES if one.name == "late blocks"))
    return clock


def test_fewer_prompts_are_used_where_the_time_is_short(command, tmp_path, ten_seconds_a_prompt):
    answer = command("tune", *SMALL, "--keep", 0.5, "--cuts", "0.02", "--minutes", 10, "--output", "out")
    assert answer[0] == 0, answer[2]
    each = 10.0 + 0.15 + 4 * 0.65 + 2 * 0.2  # seconds of a prompt
    used = int(0.75 * 600 / each)
    assert f"allows about {used} of 60 prompts" in answer[2] and "--minutes 18 for all of them" in answer[2]
    counts = json.loads((tmp_path / "out" / "tune.json").read_text())["prompts"]
    assert counts["no_time"] == 60 - used and sum(counts[part] for part in PARTS) == used


def test_a_time_too_short_for_the_promise_is_told(command, tmp_path, ten_seconds_a_prompt):
    flags = [*SMALL, "--cuts", "0.02", "--output", "out"]
    failed(command("tune", *flags, "--keep", 0.7, "--minutes", 10), "which can show at most 0.", "--minutes 18")
    ten_seconds_a_prompt.now = time.monotonic()
    failed(command("tune", *flags, "--keep", 0.5, "--minutes", 3), "at least 30 are needed", "--minutes 18")
    assert not (tmp_path / "out").exists()


def test_the_time_that_loading_took_is_gone(command, tmp_path, ten_seconds_a_prompt, monkeypatch):
    from ftp_lightning.stages import inputs

    real = inputs.load_model
    monkeypatch.setattr(inputs, "load_model", lambda stage: (ten_seconds_a_prompt.work(300.0), real(stage))[1])
    flags = [*SMALL, "--keep", 0.5, "--cuts", "0.02", "--minutes", 10, "--output", "out"]
    used = int(0.75 * 300 / (10.0 + 0.15 + 4 * 0.65 + 2 * 0.2))
    failed(command("tune", *flags), f"allows about {used} of 60 prompts", "--minutes 23 for all of them")


def test_answers_that_take_longer_than_was_estimated_end_with_the_time(
    command, tmp_path, ten_seconds_a_prompt, monkeypatch
):
    """What was answered is not asked again with more time."""
    slow, asked = own_answers.greedy, []

    def slower(model, batch, new_tokens, ends):
        asked.append(len(batch["input_ids"]))
        ten_seconds_a_prompt.work(0.0 if len(asked) < 4 else 200.0)
        return slow(model, batch, new_tokens, ends)

    monkeypatch.setattr(own_answers, "greedy", slower)
    flags = [*SMALL, "--keep", 0.5, "--cuts", "0.02", "--output", "out"]
    failed(command("tune", *flags, "--minutes", 18), "18 minutes are over before the model has answered all 60 prompts")
    assert not (tmp_path / "out").exists() and len(asked) < 3 + 8
    done = sum(asked[3:])
    assert 0 < done < 60
    again = []
    monkeypatch.setattr(own_answers, "greedy", lambda *about: again.append(len(about[1]["input_ids"])) or slow(*about))
    assert command("tune", *flags, "--minutes", 100)[0] == 0
    assert sum(again[3:]) == 60 - done
