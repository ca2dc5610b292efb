"""The embedded tasks as JSONL files, made from the stage's text and its seed; and the windows of its test text."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftp_lightning.data import choices
from ftp_lightning.data.sources import load_documents
from ftp_lightning.data.stories import SPLITS, load_stories
from ftp_lightning.data.windows import Windows, plain_windows
from ftp_lightning.errors import UserError
from ftp_lightning.stages.evaluate import OUR_TASKS, EvaluateStage

RECALL, ENDING, _ = OUR_TASKS
DELETED = "story_recall_deleted"


def test_windows(settings: EvaluateStage, tokenizer: Any) -> Windows:
    """Consecutive windows of the test text, all of them or random ones."""
    documents = load_documents(settings.data, settings.chosen_split)
    rng = random.Random(f"{settings.seed}/windows")
    return plain_windows(
        tokenizer, documents, settings.prompt_tokens, settings.continuation_tokens, settings.windows, rng
    )


class TaskFiles:
    """The rows of our tasks that are asked for, and where the others lie. UserError for files that are not there."""

    def __init__(self, settings: EvaluateStage, tokenizer: Any):
        self.rows = {task: _rows(task, settings, tokenizer) for task in settings.tasks if task in OUR_TASKS}
        self.others = {task: _local_file(task, settings.task_data) for task in settings.tasks if task not in self.rows}

    @contextmanager
    def named(self, with_deleted: bool) -> Iterator[dict[str, Path | None]]:
        """Task -> its JSONL file, None where lm-eval has the data; `with_deleted` adds recall items without facts."""
        with tempfile.TemporaryDirectory() as folder:
            files = {task: _write(Path(folder) / f"{task}.jsonl", rows) for task, rows in self.rows.items()}
            if with_deleted and RECALL in files:
                files[DELETED] = files[RECALL]
            yield files | self.others


def _rows(task: str, settings: EvaluateStage, tokenizer: Any) -> list[choices.Item]:
    """Recall items are set into the stage's own text; endings and names come from the embedded stories."""
    rng = random.Random(f"{settings.seed}/{task}")
    if task == RECALL:
        documents = load_documents(settings.data, settings.chosen_split)
        return choices.recall_items(tokenizer, documents, rng, settings.items, settings.prompt_tokens)
    stories = load_stories(settings.chosen_split if settings.chosen_split in SPLITS else "test")
    return choices.ending_items(stories, rng) if task == ENDING else choices.name_items(stories, rng)


def check_tasks(names: Sequence[str]) -> None:
    """UserError for tasks that neither we nor lm-eval know; its list is read only where one is not ours."""
    others = [name for name in names if name not in OUR_TASKS]
    if not others:
        return
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    unknown = [name for name in others if name not in known]
    if unknown:
        ours = f"Ours are {', '.join(OUR_TASKS)}; for others see `lm_eval ls tasks`."
        raise UserError(f"unknown task {', '.join(unknown)}\n{ours}")


def _local_file(task: str, folder: str | None) -> Path | None:
    if folder is None:
        return None
    path = Path(folder).expanduser() / f"{task}.jsonl"
    if not path.is_file():
        raise UserError(
            f"--task_data {folder} holds no {task}.jsonl\nPut it there, or leave --task_data out to ask the Hub."
        )
    return path


def _write(path: Path, rows: list[choices.Item]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
