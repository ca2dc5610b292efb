"""Stage `tune`: from prompts and a share of answers to keep, to the pruner that saves most."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftp_lightning.artifact import StageFolder
from ftp_lightning.cli.option import option
from ftp_lightning.cli.progress import Progress, clock, say
from ftp_lightning.cli.settings import ModelSettings, StageSettings, text_identity
from ftp_lightning.errors import UserError

if TYPE_CHECKING:
    from ftp_lightning.data.rows import Rows
    from ftp_lightning.tuning.allowance import Allowance

CUTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)


@dataclass(frozen=True, kw_only=True)
class TuneStage(StageSettings):
    """From prompts alone, find the largest FLOPs cut at which the pruned model still gives --keep of the answers that
    the model itself gives. Writes pruned/, tune.json and report.html."""

    stage: ClassVar[str] = "tune"
    hidden_flags: ClassVar[tuple[str, ...]] = ("data", "split")

    prompts: str | None = option(
        None, "file of prompts: JSON(L) of chat, prompt or instruction records, or text; `embedded`: our stories"
    )
    keep: float = option(0.99, "share of the dense model's own answers to keep", above=0.0, most=1.0)
    minutes: float = option(30.0, "time that it may take; where it is short, fewer prompts are used", above=0.0)
    cuts: tuple[float, ...] = option(CUTS, "cuts of the prefill's FLOPs to try, ascending")
    pruned: str | None = option(None, "a pruner to try as well, from its last block down", is_file=True)
    limit: int | None = option(1000, "prompts at most", least=30, most=10**7)
    batch_size: int = option(4, "prompts per forward", least=1, most=10**6)
    own_answers: str = option("runs/own_answers", "folder that keeps answers and measurements", passive=True)
    prompt_tokens: int = option(
        192, "tokens of a prompt that is cut from text; those of records keep theirs", least=4, most=10**7
    )
    continuation_tokens: int = option(32, "tokens of an answer, at most", least=1, most=10**7)

    def check(self) -> None:
        if (self.data, self.split) != (ModelSettings.data, ModelSettings.split):
            raise UserError("tune reads --prompts and splits them itself\nLeave --data and --split out.")
        if not self.cuts or list(self.cuts) != sorted(set(self.cuts)) or not 0 < self.cuts[0] <= self.cuts[-1] < 1:
            raise UserError("cuts must rise, from above 0 to below 1\nGive for example --cuts 0.1,0.2,0.3.")

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"prompts": text_identity(str(self.prompts))}

    def execute(self, progress: Progress | None = None) -> Path:
        from ftp_lightning.report import build_report

        if not self.prompts:
            raise UserError("tune needs prompts\nGive --prompts FILE: JSON lines, or a text file.")
        folder = super().execute(progress)
        if self.estimate is None:
            build_report(folder)
        return folder

    def work(self, folder: StageFolder, progress: Progress) -> None:
        from ftp_lightning.evaluation.own_answers import own_answers
        from ftp_lightning.stages.inputs import load_model, load_pruner, num_blocks
        from ftp_lightning.tuning.allowance import Allowance, OutOfTime
        from ftp_lightning.tuning.measured import Measured
        from ftp_lightning.tuning.outcome import outcome
        from ftp_lightning.tuning.parts import check_answers, check_enough, split_rows
        from ftp_lightning.tuning.recipes import RECIPES, given
        from ftp_lightning.tuning.tuner import Tuner

        model, tokenizer = load_model(self)
        num_blocks(model)
        recipes = [] if self.pruned is None else [given(load_pruner(self.pruned, model))]
        prompts = self._prompts(model, tokenizer)
        recipes += RECIPES
        planned = self._check_reachable(split_rows(prompts, self.seed), len(recipes))
        former = folder.load_state() or {}
        before, answers = former.get("seconds", 0.0), former.get("answered")
        allowance = Allowance(60 * self.minutes, before, progress.started, answers)
        place = Path(self.own_answers).expanduser()
        used = former.get("prompts") or _affordable(self, model, prompts, planned, place, allowance, progress)
        unused, prompts = len(prompts) - used, prompts.subset(range(used))

        def tell(what: str) -> None:
            progress.step(allowance.spent, allowance.seconds, what, allowance.left)

        def note() -> None:
            folder.save_state({"seconds": allowance.spent, "prompts": used, "answered": allowance.answered})

        def answered(done: int, of: int) -> None:
            note()
            allowance.check()
            tell(f"own answers, {done} of {of}")

        note()
        try:
            rows = own_answers(model, prompts, self.continuation_tokens, place, tell=answered)
        except OutOfTime:
            raise UserError(
                f"the {self.minutes:g} minutes are over before the model has answered all {used} prompts\n"
                "Give more --minutes, with --overwrite where a run was interrupted: no answer is made twice."
            ) from None
        check_enough(str(self.prompts), rows.rows, rows.left_out, _longest(self, model))
        check_answers(rows)
        parts = split_rows(rows, self.seed)
        self._check_reachable(parts, len(recipes))  # prompts that are answered by nothing are gone
        measured = Measured(model, place / "measured", self.batch_size)
        tuner = Tuner(measured, parts, self.keep, self.cuts, allowance, self.seed, tell, note)
        tuned = tuner.run(recipes)
        counts = rows.counts() | {part: len(found) for part, found in parts.items()} | {"no_time": unused}
        found = outcome(tuned, self.keep, counts)
        tuned.pruner.save(folder.place("pruned"), base=self.model, model=model)
        folder.write_json("tune.json", found)
        folder.write_json("metrics.json", {"chosen": found["chosen"], "confirmed": found["confirmed"]})
        say("\n".join(found["sentences"]))
        progress.done(f"wrote the pruner ({found['recipe']}) to {folder.path / 'pruned'}, and report.html beside it")

    def _prompts(self, model: Any, tokenizer: Any) -> Rows:
        from ftp_lightning.tuning.parts import read_prompts

        most = _longest(self, model)
        return read_prompts(str(self.prompts), tokenizer, self.prompt_tokens, most, self.limit, self.seed)

    def _check_reachable(self, parts: dict[str, Rows], recipes: int) -> dict[str, int]:
        """Phase -> prefills at most, the dense ones among them, where so many recipes are compared.

        UserError where so few prompts cannot show what is asked for.
        """
        from ftp_lightning.tuning.parts import check_texts
        from ftp_lightning.tuning.promise import prompts_needed, reachable

        check_texts(parts)
        most, total = reachable(parts["validation"].documents), sum(map(len, parts.values()))
        if most < self.keep:
            documents, enough = parts["validation"].documents, ""
            if self.keep < 1:
                alone = len(set(documents)) == len(documents)
                more = f"at least {prompts_needed(self.keep)} prompts" if alone else "prompts from more texts"
                enough = f", or {more}"
            never = "no number of prompts can show that all answers are kept: " if self.keep == 1 else ""
            raise UserError(
                f"keep is {self.keep:g}: {never}{total} different prompts, {len(parts['validation'])} of them for "
                f"validation, can show at most {int(1000 * most) / 1000:g}\n"
                f"Give --keep {int(1000 * most) / 1000:g} or less{enough}."
            )
        sizes, cuts = {name: len(rows) for name, rows in parts.items()}, len(self.cuts)
        choice, validation = (1 + recipes * cuts) * sizes["choice"], (1 + cuts) * sizes["validation"]
        return {"choice": choice, "validation": validation, "confirmation": 2 * sizes["held_out"]}


def _longest(settings: TuneStage, model: Any) -> int:
    """Tokens of a prompt that leave room for an answer."""
    from ftp_lightning.evaluation.speed.prompts import positions

    limit = positions(model)
    return 10**9 if limit is None else limit - settings.continuation_tokens


def _affordable(
    settings: TuneStage,
    model: Any,
    prompts: Rows,
    planned: dict[str, int],
    place: Path,
    allowance: Allowance,
    progress: Progress,
) -> int:
    """How many of the prompts --minutes allows, by the time of a few of them; says what they will take. UserError where
    so few cannot show what is asked for."""
    from ftp_lightning.evaluation.own_answers import BATCH, end_tokens, greedy, unanswered
    from ftp_lightning.tuning.allowance import FILLED, affordable, needed
    from ftp_lightning.tuning.parts import LEAST, split_rows
    from ftp_lightning.tuning.promise import reachable

    spent, left = allowance.spent, allowance.left
    middle = max(0, (len(prompts) - BATCH) // 2)
    typical, ends = prompts.batch(prompts.order[middle : middle + BATCH]), end_tokens(model)
    greedy(model, prompts.batch(prompts.order[:1]), 1, ends)  # the first call of a process is slow
    prefill = _seconds(lambda: greedy(model, typical, 1, ends)) / BATCH
    answer = _seconds(lambda: greedy(model, typical, settings.continuation_tokens, ends)) / BATCH
    asked = unanswered(model, prompts, settings.continuation_tokens, place)
    seconds = needed(asked, answer, prefill)
    used = affordable(seconds, left)
    if used < len(prompts):
        told = f"--minutes {settings.minutes:g} allows about {used} of {len(prompts)} prompts"
        documents = split_rows(prompts.subset(range(used)), settings.seed)["validation"].documents
        shown = int(1000 * reachable(documents)) / 1000
        enough = f"Give --minutes {math.ceil((spent + seconds[-1] / FILLED) / 60)} for all of them"
        if used < LEAST:
            raise UserError(f"{told}, at least {LEAST} are needed\n{enough}.")
        if shown < settings.keep:
            raise UserError(f"{told}, which can show at most {shown:g}\n{enough}, or --keep {shown:g} or less.")
        progress.say(f"{told}; {enough[0].lower()}{enough[1:]}.")
    measuring = prefill * sum(planned.values()) * used / len(prompts)
    progress.say(
        f"{used} prompts. The model's own answers take about {clock(answer * sum(asked[:used]))}, measurements at most "
        f"{clock(measuring)}; --minutes {settings.minutes:g} may end it sooner. After Ctrl-C the same command resumes."
    )
    return used


def _seconds(run: Any) -> float:
    started = time.monotonic()
    run()
    return time.monotonic() - started
