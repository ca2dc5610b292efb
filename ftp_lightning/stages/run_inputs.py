"""What `run` asks of its inputs before it writes anything: hours later would be late."""

from __future__ import annotations

from typing import Any, cast

from ftp_lightning import models
from ftp_lightning.cli.settings import StageSettings
from ftp_lightning.data.task_names import TWINNED
from ftp_lightning.stages import inputs
from ftp_lightning.stages.benchmark import BenchmarkStage
from ftp_lightning.stages.evaluate import EvaluateStage
from ftp_lightning.stages.search import SearchStage
from ftp_lightning.stages.task_files import check_tasks, local_files, made_rows, test_rows

ROWS = 8
"""Rows and questions of a kind that are tried of each split; the stages draw these very ones first [ours]."""


def check_inputs(stages: dict[str, StageSettings]) -> int:
    """UserError for texts too short, tasks unknown, files missing or lengths beyond the model, of any stage to come.

    Returns how many blocks the model has.
    """
    first, evaluate = stages["sensitivity"], cast(EvaluateStage, stages["evaluate"])
    models.resolve_device(first.device)
    config = models.load_config(first.model, revision=first.revision)
    tokenizer = models.load_tokenizer(first.model, revision=first.revision)
    inputs.check_positions(config, first.prompt_tokens + first.continuation_tokens)
    inputs.check_kv(first, config)
    inputs.check_budget_length(cast(SearchStage, stages["search"]), config)
    lengths = cast(BenchmarkStage, stages["benchmark"]).lengths if "benchmark" in stages else ()
    inputs.check_positions(config, max(lengths or [1]), "prompts of the benchmark", "Give shorter --lengths.")
    check_tasks(evaluate.tasks)
    local_files(evaluate)
    if evaluate.apply_chat_template:
        inputs.check_chat_template(first.model, tokenizer)
    _check_texts(stages, tokenizer)
    test_rows(evaluate, tokenizer)
    for task in evaluate.tasks:
        if task in TWINNED:
            rows = made_rows(task, evaluate, tokenizer, min(ROWS, evaluate.items))
            inputs.check_questions(config, tokenizer, rows)
    return config.get_text_config().num_hidden_layers


def _check_texts(stages: dict[str, Any], tokenizer) -> None:
    """Draw the first rows of every text and split that is calibrated, trained or validated on."""
    asked: dict[tuple[str, str], tuple[Any, str]] = {}
    for name in ("sensitivity", "search", "train", "finetune"):
        splits = (stages[name].chosen_split, "validation") if name == "train" else (stages[name].chosen_split,)
        asked |= {(stages[name].data, split): (stages[name], split) for split in splits}
    for settings, split in asked.values():
        count = ROWS if settings.recall_share else 1
        inputs.unanswered_rows(settings, tokenizer, count, settings.recall_share and 0.5, split)
