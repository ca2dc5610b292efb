"""The command line: `python -m ftp_lightning STAGE [flags]`, also installed as `ftp-lightning`."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from ftp_lightning.errors import UserError
from ftp_lightning.launcher import launched

STAGES = {
    "run": ("RunStage", "the whole chain: sensitivity, search, train, finetune, evaluate, benchmark, report"),
    "sensitivity": ("SensitivityStage", "what each block changes, and what pruning it alone costs"),
    "search": ("SearchStage", "a schedule for a budget, by genetic search; with --pruned this is the fine-tuning"),
    "train": ("TrainStage", "train the router"),
    "evaluate": ("EvaluateStage", "KL, perplexity, answers kept, retention and skill against dense"),
    "benchmark": ("BenchmarkStage", "prefill time of the pruned model against the stock one"),
    "tune": ("TuneStage", "from prompts and a share of answers to keep to the pruner that saves most"),
    "generate": ("GenerateStage", "one prompt, dense and pruned: both texts, tokens skipped, time to first token"),
    "report": ("ReportStage", "one HTML page from the folder of a run"),
    "sweep": ("SweepStage", "all runs of a study, from a wandb sweep file, and what they say together"),
    "trial": ("TrialStage", "one run of a study: schedule, router, and what they keep"),
    "prefetch": ("PrefetchStage", "download models and data sets, for nodes without network"),
}
"""Stage -> (its settings class in `ftp_lightning.stages.STAGE`, or in `studies.STAGE`; what it does)."""
STUDIES = ("sweep", "trial")

USAGE = """usage: ftp-lightning STAGE [--config FILE ...] [--KEY VALUE ...]

stages:
{}

`ftp-lightning STAGE --help` shows its flags."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage. Returns the exit status: 0, 2 for what the user can mend (three lines tell it), 130 stopped."""
    argv = list(sys.argv[1:] if argv is None else argv)
    hush()
    try:
        return _run(argv)
    except UserError as error:
        print("\n".join(str(error).splitlines()[:3]), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def hush() -> None:
    """Silence what libraries say of themselves, of retries that we tell the end of, and of deprecations inside them.

    Errors and warnings that a user can act on still come through.
    """
    for name in ("lm_eval", "lm_eval.models.huggingface", "huggingface_hub.utils._http"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_warning)
    logging.getLogger("transformers.tokenization_utils_base").addFilter(_is_not_about_length)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available on your system but is not used.*")


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _is_not_about_length(record: logging.LogRecord) -> bool:
    """Texts are tokenised whole and then cut into windows, so their length is no mistake."""
    return "Token indices sequence length" not in str(record.msg)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE.format("\n".join(f"  {name:12} {what}" for name, (_, what) in STAGES.items())))
        return 0 if argv else 2
    if argv[0] == "--version":
        from ftp_lightning import __version__

        print(__version__)
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
    if stage not in STAGES:
        raise UserError(f"there is no stage {stage!r}\nStages: {', '.join(STAGES)}.")
    from ftp_lightning.cli.parser import parse_settings

    folder = "studies" if stage in STUDIES else "stages"
    settings_class = getattr(import_module(f"ftp_lightning.{folder}.{stage}"), STAGES[stage][0])
    return parse_settings(settings_class, arguments)


if __name__ == "__main__":
    sys.exit(main())
