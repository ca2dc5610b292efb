"""Stage `tune`: from prompts and a share of answers to keep, to the pruner that saves most."""

from __future__ import annotations

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
    minutes: float = option(30.0, "time after which no further cut is tried", above=0.0)
    cuts: tuple[float, ...] = option(CUTS, "cuts of the prefill's FLOPs to try, ascending")
    pruned: str | None = option(None, "a pruner to try as well, from its last block down", is_file=True)
    limit: int | None = option(1000, "prompts at most", least=1, most=10**7)
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
        from ftp_lightning.tuning.measured import Measured
        from ftp_lightning.tuning.outcome import outcome
        from ftp_lightning.tuning.parts import check_answers, check_enough, split_rows
        from ftp_lightning.tuning.recipes import RECIPES, given
        from ftp_lightning.tuning.tuner import Allowance, Tuner

        model, tokenizer = load_model(self)
        num_blocks(model)
        recipes = [] if self.pruned is None else [given(load_pruner(self.pruned, model))]
        prompts = self._prompts(model, tokenizer)
        planned = self._check_reachable(split_rows(prompts, self.seed))
        former = folder.load_state() or {}
        allowance = Allowance(60 * self.minutes, former.get("seconds", 0.0))
        _say_estimate(self, model, prompts, planned, progress, bool(former))
        folder.save_state({"seconds": allowance.spent})

        place = Path(self.own_answers).expanduser()
        rows = own_answers(model, prompts, self.continuation_tokens, place)
        check_enough(str(self.prompts), rows.rows, rows.left_out, _longest(self, model))
        check_answers(rows)
        parts = split_rows(rows, self.seed)
        self._check_reachable(parts)  # prompts that are answered by nothing are gone

        def tell(what: str) -> None:
            progress.step(allowance.spent, allowance.seconds, what, allowance.left)

        def note() -> None:
            folder.save_state({"seconds": allowance.spent})

        measured = Measured(model, place / "measured", self.batch_size)
        tuner = Tuner(measured, parts, self.keep, self.cuts, allowance, self.seed, tell, note)
        tuned = tuner.run([*recipes, *RECIPES])
        counts = rows.counts() | {part: len(found) for part, found in parts.items()}
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

    def _check_reachable(self, parts: dict[str, Rows]) -> dict[str, int]:
        """Phase -> prompts that it measures at most; UserError where so few cannot show what is asked for."""
        from ftp_lightning.tuning.promise import prompts_needed, reachable
        from ftp_lightning.tuning.recipes import RECIPES

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
        choice, validation = len(RECIPES) * cuts * sizes["choice"], cuts * sizes["validation"]
        return {"choice": choice, "validation": validation, "confirmation": sizes["held_out"]}


def _longest(settings: TuneStage, model: Any) -> int:
    """Tokens of a prompt that leave room for an answer."""
    from ftp_lightning.evaluation.speed.prompts import positions

    limit = positions(model)
    return 10**9 if limit is None else limit - settings.continuation_tokens


def _say_estimate(
    settings: TuneStage, model: Any, prompts: Rows, planned: dict[str, int], progress: Progress, again: bool
) -> None:
    """Say how long it will take at most, by the time of one prompt; UserError where the answers alone take longer."""
    from ftp_lightning.evaluation.own_answers import BATCH, end_tokens, greedy

    middle = max(0, (len(prompts) - BATCH) // 2)
    typical, ends = prompts.batch(prompts.order[middle : middle + BATCH]), end_tokens(model)
    greedy(model, prompts.batch(prompts.order[:1]), 1, ends)  # the first call of a process is slow
    one = _seconds(lambda: greedy(model, typical, 1, ends)) / BATCH
    answers = len(prompts) * _seconds(lambda: greedy(model, typical, settings.continuation_tokens, ends)) / BATCH
    if not again and answers > 60 * settings.minutes:
        raise UserError(
            f"the model's own answers to {len(prompts)} prompts alone take about {clock(answers)}, and --minutes "
            f"allows {settings.minutes:g}\nGive a --limit, or more --minutes."
        )
    measuring = one * sum(planned.values())
    progress.say(
        f"{len(prompts)} prompts. The model's own answers take about {clock(answers)}, measurements at most "
        f"{clock(measuring)}; --minutes {settings.minutes:g} may end it sooner. After Ctrl-C the same command resumes."
    )


def _seconds(run: Any) -> float:
    started = time.monotonic()
    run()
    return time.monotonic() - started
