"""The embedded tasks as JSONL files, made from the stage's text and its seed; and the windows of its test text."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftp_lightning.data import choices
from ftp_lightning.data.long_tasks import long_items
from ftp_lightning.data.sources import load_documents
from ftp_lightning.data.stories import SPLITS, load_stories
from ftp_lightning.data.task_names import LONG, OURS
from ftp_lightning.data.windows import Windows, plain_windows
from ftp_lightning.evaluation.harness.declared import DECLARED
from ftp_lightning.evaluation.harness.declared import RECALL as FACTS
from ftp_lightning.evaluation.harness.task_data import Files, find_files
from ftp_lightning.stages.inputs import text_named

if TYPE_CHECKING:
    from ftp_lightning.stages.evaluate import EvaluateStage

RECALL, ENDING, _ = OURS
MADE = (*OURS, *LONG)
"""Tasks whose items are made here; all others are lm-eval's."""
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
        self.rows = {task: _rows(task, settings, tokenizer) for task in settings.tasks if task in MADE}
        self.others = local_files(settings)

    def with_facts(self) -> list[list[choices.Item]]:
        """The rows of every task that has facts in its passages."""
        return [rows for task, rows in self.rows.items() if task in FACTS]

    @contextmanager
    def named(self, with_deleted: bool) -> Iterator[dict[str, Path | Files | None]]:
        """Task -> its JSONL files, None where lm-eval has the data; `with_deleted` adds items without their facts."""
        with tempfile.TemporaryDirectory() as folder:
            files = {task: _write(Path(folder) / f"{task}.jsonl", rows) for task, rows in self.rows.items()}
            deleted = {f"{task}_deleted": files[task] for task in FACTS if with_deleted and task in files}
            yield files | deleted | self.others


def _rows(task: str, settings: EvaluateStage, tokenizer: Any) -> list[choices.Item]:
    """Recall items are set into the stage's own text; endings and names come from the embedded stories."""
    if task == RECALL:
        return recall_rows(settings, tokenizer, settings.items)
    if task in LONG:
        return long_rows(task, settings, tokenizer, settings.items)
    rng = random.Random(f"{settings.seed}/{task}")
    stories = load_stories(settings.chosen_split if settings.chosen_split in SPLITS else "test")
    return choices.ending_items(stories, rng) if task == ENDING else choices.name_items(stories, rng, NAMES_PER_STORY)


def recall_rows(settings: EvaluateStage, tokenizer: Any, count: int) -> list[choices.Item]:
    """The first `count` recall items of the stage, set into its own text."""
    rng = random.Random(f"{settings.seed}/{RECALL}")
    with text_named(settings.data, settings.chosen_split):
        documents = load_documents(settings.data, settings.chosen_split)
        return choices.recall_items(tokenizer, documents, rng, count, settings.prompt_tokens)


def long_rows(task: str, settings: EvaluateStage, tokenizer: Any, count: int) -> list[choices.Item]:
    """The first `count` items of a long-context task, at --prompt_tokens and set into the stage's own text."""
    rng = random.Random(f"{settings.seed}/{task}")
    with text_named(settings.data, settings.chosen_split):
        documents = load_documents(settings.data, settings.chosen_split)
        return long_items(task, tokenizer, documents, rng, count, settings.prompt_tokens)


def local_files(settings: EvaluateStage) -> dict[str, Files | None]:
    """Task -> its files in --task_data, or None, for the tasks that are not made here. UserError where they are not
    there."""
    return {task: local_file(task, settings.task_data) for task in settings.tasks if task not in MADE}


def check_tasks(names: Sequence[str]) -> None:
    """UserError, with the nearest names, for tasks that neither we nor lm-eval know; its list takes seconds to read, so
    that is done only where one is not known here."""
    others = [name for name in names if name not in MADE and name not in DECLARED]
    if not others:
        return
    from lm_eval.tasks import TaskManager

    from ftp_lightning.evaluation.harness.tasks import unknown_task

    known = TaskManager().all_tasks
    for name in others:
        if name not in known:
            raise unknown_task(name, [*MADE, *known])


def local_file(task: str, folder: str | None) -> Files | None:
    return None if folder is None else find_files(task, folder)


def _write(path: Path, rows: list[choices.Item]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
