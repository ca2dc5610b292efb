"""The command line: `python -m ftp_lightning STAGE [flags]`, also installed as `ftp-lightning`."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from ftp_lightning.errors import UserError, machine_error
from ftp_lightning.launcher import launched
from ftp_lightning.stopping import RESUME, Stopped, heeding, stopped_by

STAGES = {
    "try": ("TryStage", "see what pruning does to one prompt: both answers, tokens in colour, times"),
    "doctor": ("DoctorStage", "say what is installed, which models are at hand, and what this machine can do"),
    "run": ("RunStage", "prune a model with the whole method, measure it, and write a report"),
    "sensitivity": ("SensitivityStage", "measure what each block changes, and what pruning it alone costs"),
    "search": ("SearchStage", "find a schedule for a budget; with --pruned, tune that of a pruner"),
    "train": ("TrainStage", "train the router under a schedule"),
    "evaluate": ("EvaluateStage", "compare a pruned model with the dense one: answers kept, KL, tasks"),
    "benchmark": ("BenchmarkStage", "time the pruned model against the dense one"),
    "tune": ("TuneStage", "find the pruner that saves most and still keeps a share of the answers to your prompts"),
    "generate": ("GenerateStage", "continue one prompt, dense and pruned: texts, tokens skipped, time to first token"),
    "report": ("ReportStage", "write one HTML page about a run, a study, or several runs"),
    "sweep": ("SweepStage", "carry out all runs of a study, from a wandb sweep file, and compare them"),
    "trial": ("TrialStage", "carry out one run of a study"),
    "serve": ("ServeStage", "serve a model to OpenAI clients, dense or pruned"),
    "export": ("ExportStage", "write model and pruner as one folder for stock transformers"),
    "prefetch": ("PrefetchStage", "download models and data sets, for machines without network"),
}
"""Stage -> (its settings class in `ftp_lightning.stages.STAGE`, or in `studies.STAGE`; what it does)."""
STUDIES = ("sweep", "trial")
FILES = {"try": "first_look"}
"""Stage -> its file, where that cannot have the stage's name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage. Returns the exit status: 0; 2 for what the user can mend (three lines tell it); 128 + n after
    signal n."""
    argv = list(sys.argv[1:] if argv is None else argv)
    collect_seldom()
    hush()
    try:
        with heeding():
            try:
                return _run(argv)
            except BaseException as error:
                return _told(error)
    except (RuntimeError, OSError) as error:  # heeding needs a thread and a socket
        return _told(error)


def _told(error: BaseException) -> int:
    """Say what ended the stage; the exit status. Raises what is a fault of this package.

    Once a signal has come, whatever the stage ends with is its doing: libraries make other errors of `Stopped`.
    """
    if (number := error.number if isinstance(error, Stopped) else stopped_by()) is not None:
        return _say(f"\n{RESUME}", 128 + number)
    if isinstance(error, KeyboardInterrupt):
        return _say(f"\n{RESUME}", 130)
    if isinstance(error, BrokenPipeError):  # nobody reads what we print any more
        _print_no_more()
        return 141
    if isinstance(error, UserError):
        from ftp_lightning.cli.messages import shown

        return _say(shown(error))
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] != "ftp_lightning":
        return _say(f"the package {error.name} is not installed\nRun `pip install .` in the clone, or `make setup`.")
    if isinstance(error, MemoryError):
        return _say("there is not enough memory\nGive smaller sizes, or free some memory.")
    if (told := machine_error(error)) is None:
        raise error
    return _say(str(told))


def _say(text: str, status: int = 2) -> int:
    """Print the last word; where its stream is gone, as that of a closed terminal, the status says it alone."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _print_no_more()
    return status


def _print_no_more() -> None:
    """The interpreter would complain once more of what it could not print, and end with a status of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def collect_seldom() -> None:
    """Look for garbage in cycles more seldom: it takes a fifth of the time in which the libraries are imported."""
    gc.set_threshold(50_000, 20, 20)


def hush() -> None:
    """Silence what libraries say of themselves, of retries that we tell the end of, and of deprecations inside them.

    Errors and warnings that a user can act on still come through.
    """
    for name in ("lm_eval", "lm_eval.models.huggingface", "huggingface_hub.utils._http"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_warning)
    logging.getLogger("transformers.tokenization_utils_base").addFilter(_is_not_about_length)
    logging.getLogger("transformers.utils.generic").addFilter(_is_not_about_caches)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available on your system but is not used.*")


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _is_not_about_length(record: logging.LogRecord) -> bool:
    """Texts are tokenised whole and then cut into windows, so their length is no mistake."""
    return "Token indices sequence length" not in str(record.msg)


def _is_not_about_caches(record: logging.LogRecord) -> bool:
    """From transformers 5.24 on outputs have their cache under another name; the old one works in every version."""
    return "past_key_values" not in str(record.msg)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        from ftp_lightning.cli.help import stage_map

        print(stage_map(STAGES))
        return 0 if argv else 2
    if argv[0] == "--version":
        from ftp_lightning import __version__

        print(__version__)
        return 0
    if argv[0].replace("-", "_").startswith("__print_completion"):
        from ftp_lightning.cli.completion import completion_script

        print(completion_script(argv[1] if len(argv) > 1 else "", STAGES, settings_of))
        return 0
    settings = parse(argv[0], argv[1:])
    if settings is not None and launched():
        from ftp_lightning.cli.in_step import execute_in_step

        execute_in_step(settings)
    elif settings is not None:
        settings.execute()
    return 0


def parse(stage: str, arguments: Sequence[str]):
    """The stage's settings from its flags and config files; None where the parser has answered itself (`--help`)."""
    from ftp_lightning.cli.parser import parse_settings

    return parse_settings(settings_of(stage), arguments)


def settings_of(stage: str):
    """The settings class of a stage. UserError, with the likely one, for a stage that does not exist."""
    if stage not in STAGES:
        from ftp_lightning.cli.messages import nearest

        meant = f"Did you mean {' or '.join(near)}? " if (near := nearest(stage, [*STAGES])) else ""
        raise UserError(f"there is no stage {stage!r}\n{meant}Stages: {', '.join(STAGES)}.")
    folder = "studies" if stage in STUDIES else "stages"
    return getattr(import_module(f"ftp_lightning.{folder}.{FILES.get(stage, stage)}"), STAGES[stage][0])


if __name__ == "__main__":
    sys.exit(main())
