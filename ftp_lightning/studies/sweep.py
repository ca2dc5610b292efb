"""Stage `sweep`: all runs of a study, from the file that wandb's agents take, and what they say together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from ftp_lightning.cli.option import option
from ftp_lightning.cli.progress import Progress, say
from ftp_lightning.cli.settings import Settings
from ftp_lightning.errors import UserError
from ftp_lightning.named_file import LARGEST_YAML, read_named_text
from ftp_lightning.studies.trial import STUDIES, TrialStage


@dataclass(frozen=True, kw_only=True)
class SweepStage(Settings):
    """Run a study without account or network: the grid of a wandb sweep file. Writes study.json, a table, a figure.

    Finished runs are not done again, broken ones go on. bayes, random and hyperband are run by `wandb agent`.
    """

    stage: ClassVar[str] = "sweep"

    study: str | None = option(None, "the sweep file: sweeps/NAME.yaml", is_file=True)
    model: str | None = option(None, "model of all runs; by default what the study says, or embedded")
    data: str | None = option(None, "text of all runs; by default what the study says, or our stories")
    budget: float | None = option(None, "budget of all runs", least=0.0, below=1.0)
    seeds: int | None = option(None, "how many seeds; by default those of the study", least=1, most=10_000)
    seed: int = option(0, "the first of --seeds", least=0, below=2**32)
    output: str | None = option(None, f"folder to write; by default {STUDIES}/NAME", passive=True)
    device: str | None = option(None, "cpu, cuda; by default the best there is")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = option(None, "precision of the model")
    revision: str | None = option(None, "branch, tag or commit of a model from the Hub")
    jobs: int | None = option(None, "runs at once; by default one per GPU, else one", least=1, most=1024, passive=True)
    tracking: Literal["csv", "tensorboard", "wandb", "none"] = option("none", "where runs are logged", passive=True)
    overwrite: bool = option(False, "make runs again that other inputs or other code have made", passive=True)

    @property
    def name(self) -> str:
        return Path(self.study or "").stem

    @property
    def folder(self) -> Path:
        return Path(self.output or f"{STUDIES}/{self.name}").expanduser()

    def execute(self, progress: Progress | None = None) -> Path:
        from ftp_lightning.studies.runner import carry_out, is_finished, to_do
        from ftp_lightning.studies.study_table import TABLE, write_study
        from ftp_lightning.whole_files import make_folder

        progress = progress or Progress(f"study {self.name}")
        trials, question = self.trials(), self.question()
        left = to_do(trials)
        make_folder(self.folder)
        if not left:
            progress.say(f"all {len(trials)} runs are done already, there is nothing to do")
        else:
            progress.say(f"{question} {len(left)} of {len(trials)} runs to do")
        failures = carry_out(left, self.chosen_jobs(len(left)), progress) if left else []
        write_study(self.folder, question, [trial for trial in trials if is_finished(trial)], self.pairs())
        say((self.folder / TABLE).read_text(encoding="utf-8"), end="")
        if failures:
            raise UserError(f"{len(failures)} of {len(trials)} runs could not be done; the first: {failures[0]}")
        return self.folder

    def question(self) -> str:
        """The first line of the file."""
        first = read_named_text(self.study or "", LARGEST_YAML).splitlines()[0]
        return first.removeprefix("#").strip() if first.startswith("#") else f"What does {self.name} change?"

    def trials(self) -> list[TrialStage]:
        """The runs of the study, seed by seed: an interrupted study has compared everything on its first seeds.

        UserError for whatever a run would be refused for.
        """
        sweep, runs, names = self._expanded()
        trials = sorted((self._trial(sweep, run, names) for run in runs), key=lambda trial: trial.seed)
        self._check_different(trials)
        return trials

    def pairs(self) -> list[tuple[str, str]]:
        """Of a study that varies several parameters: the labels of a row and of the one that differs from it in the
        last parameter alone, which has its first value there."""
        _, runs, names = self._expanded()
        if len(names) < 2:
            return []
        alike: dict[str, dict[str, None]] = {}  # labels in order, each once: seeds share theirs
        for run in runs:
            alike.setdefault(label_of(run, names[:-1]), {})[label_of(run, names)] = None
        return [(label, first) for first, *others in alike.values() for label in others]

    def _expanded(self) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
        """The sweep with what is given here, its runs, and what they vary."""
        from ftp_lightning.studies.sweep_file import expand, read_sweep, varied, with_values

        if not self.study:
            raise UserError("sweep needs a study\nGive --study sweeps/NAME.yaml.")
        seeds = list(range(self.seed, self.seed + self.seeds)) if self.seeds else None
        given = {name: getattr(self, name) for name in ("model", "data", "budget", "device", "dtype", "revision")}
        sweep = with_values(read_sweep(self.study), self.study, **given, seed=seeds)
        return sweep, expand(sweep), varied(sweep)

    def _trial(self, sweep: dict[str, Any], run: dict[str, Any], names: list[str]) -> TrialStage:
        from ftp_lightning.__main__ import parse
        from ftp_lightning.studies.sweep_file import arguments

        stage, words = arguments(sweep, run)
        if stage != "trial":
            raise UserError(
                f"study: its runs are of stage {stage}, and only `trial` is compared\nRun it with `wandb agent`."
            )
        own: dict[str, Any] = {"label": label_of(run, names), "study": self.name, "tracking": self.tracking}
        own |= {"shared_folder": self.folder.parent / "shared", "overwrite": self.overwrite}
        trial = parse(stage, [*words, *(f"--{name}={value}" for name, value in own.items())])
        return replace(trial, output=str(self.folder / "runs" / trial.digest))

    def _check_different(self, trials: list[TrialStage]) -> None:
        """UserError where two runs are one, or two rows of the table would have one name."""
        rows: set[tuple] = set()
        known: dict[str, str | None] = {}
        for trial in trials:
            if (trial.label, trial.seed) in rows:
                raise UserError(f"study: two runs are called {trial.label}\nGive each a label of its own.")
            if trial.digest in known:
                raise UserError(
                    f"study: {known[trial.digest]} and {trial.label} are one and the same run\nLeave one out."
                )
            rows.add((trial.label, trial.seed))
            known[trial.digest] = trial.label

    def chosen_jobs(self, runs: int) -> int:
        from ftp_lightning.studies.runner import visible_gpus

        wanted = self.jobs or (1 if self.device == "cpu" else max(1, len(visible_gpus())))
        return min(wanted, runs)


def label_of(run: dict[str, Any], names: list[str]) -> str:
    """ "skip mean", "kv keep, skip mean": what a run has of its own; a `config` says its own label."""
    parts = (
        run[name].get("label", run[name]) if isinstance(run[name], dict) else f"{name} {run[name]}" for name in names
    )
    return ", ".join(map(str, parts)) or "all"
