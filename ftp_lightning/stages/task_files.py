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
from ftp_lightning.stages.inputs import text_named

RECALL, ENDING, _ = OUR_TASKS
DELETED = "story_recall_deleted"
NAMES_PER_STORY = 2
"""Contexts of whole stories are dear, and names of one story say much the same."""


def test_windows(settings: EvaluateStage, tokenizer: Any) -> Windows:
    """Consecutive windows of the test text, all of them or random ones."""
    shape, rng = (settings.prompt_tokens, settings.continuation_tokens), random.Random(f"{settings.seed}/windows")
    with text_named(settings.data, settings.chosen_split):
        documents = load_documents(settings.data, settings.chosen_split)
        return plain_windows(tokenizer, documents, *shape, settings.windows, rng)


class TaskFiles:
    """The rows of our tasks that are asked for, and where the others lie. UserError for files that are not there."""

    def __init__(self, settings: EvaluateStage, tokenizer: Any):
        self.rows = {task: _rows(task, settings, tokenizer) for task in settings.tasks if task in OUR_TASKS}
        self.others = local_files(settings)

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
    if task == RECALL:
        return recall_rows(settings, tokenizer, settings.items)
    rng = random.Random(f"{settings.seed}/{task}")
    stories = load_stories(settings.chosen_split if settings.chosen_split in SPLITS else "test")
    return choices.ending_items(stories, rng) if task == ENDING else choices.name_items(stories, rng, NAMES_PER_STORY)


def recall_rows(settings: EvaluateStage, tokenizer: Any, count: int) -> list[choices.Item]:
    """The first `count` recall items of the stage, set into its own text."""
    rng = random.Random(f"{settings.seed}/{RECALL}")
    with text_named(settings.data, settings.chosen_split):
        documents = load_documents(settings.data, settings.chosen_split)
        return choices.recall_items(tokenizer, documents, rng, count, settings.prompt_tokens)


def local_files(settings: EvaluateStage) -> dict[str, Path | None]:
    """Task -> its file in --task_data, or None, for the tasks that are not ours. UserError where one is not there."""
    return {task: local_file(task, settings.task_data) for task in settings.tasks if task not in OUR_TASKS}


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


def local_file(task: str, folder: str | None) -> Path | None:
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
