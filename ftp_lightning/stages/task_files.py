"""The embedded tasks as JSONL files, made from the stage's text and its seed; and the rows of its test text."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftp_lightning.data import choices
from ftp_lightning.data.last_word import last_word_items
from ftp_lightning.data.long_tasks import long_items
from ftp_lightning.data.needles import needle_items
from ftp_lightning.data.prompt_length import Item, PromptLength
from ftp_lightning.data.prompts import sampled_prompts, text_windows
from ftp_lightning.data.reading import read_questions, reading_items
from ftp_lightning.data.rows import Rows
from ftp_lightning.data.ruler import common_word_items, frequent_word_items, tracking_items
from ftp_lightning.data.sources import load_documents
from ftp_lightning.data.stories import SPLITS, load_stories
from ftp_lightning.data.task_names import LAST_WORD, LONG, NIAH, OURS, READING, TWINNED
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.harness.declared import DECLARED
from ftp_lightning.evaluation.harness.task_data import Files, find_files
from ftp_lightning.stages.inputs import check_chat_template, text_named

if TYPE_CHECKING:
    from ftp_lightning.stages.evaluate import EvaluateStage

RECALL, ENDING, NAME = OURS
FROM_TEXT = (RECALL, *LONG, *NIAH, LAST_WORD)
NAMES_PER_STORY = 2
"""Contexts of whole stories are dear, and names of one story say much the same."""


def test_rows(settings: EvaluateStage, tokenizer: Any) -> Rows:
    """Consecutive windows of the test text, or prompts, as --rows says: all of them or random ones."""
    source, split = settings.data, settings.chosen_split
    shape = (settings.prompt_tokens, settings.continuation_tokens)
    with text_named(source, split):
        if settings.rows != "windows":
            return sampled_prompts(source, split, tokenizer, *shape, settings.windows, settings.seed)
        return text_windows(source, split, tokenizer, *shape, settings.windows, settings.seed)


class TaskFiles:
    """The rows of our tasks that are asked for, and where the others lie. UserError for files that are not there."""

    def __init__(self, settings: EvaluateStage, tokenizer: Any):
        self.rows = {task: made_rows(task, settings, tokenizer) for task in settings.tasks if task in MAKERS}
        self.others = local_files(settings)

    def with_facts(self) -> list[list[Item]]:
        """The rows of every task whose answers are in its passages."""
        return [rows for task, rows in self.rows.items() if task in TWINNED]

    @contextmanager
    def named(self, with_deleted: bool) -> Iterator[dict[str, Path | Files | None]]:
        """Task -> its JSONL files, None where lm-eval has the data; `with_deleted` adds items without their facts."""
        with tempfile.TemporaryDirectory() as folder:
            files = {task: _write(Path(folder) / f"{task}.jsonl", rows) for task, rows in self.rows.items()}
            deleted = {f"{task}_deleted": files[task] for task in TWINNED if with_deleted and task in files}
            yield files | deleted | self.others


def _documents(settings: EvaluateStage) -> list[str]:
    return load_documents(settings.data, settings.chosen_split)


def recall_rows(settings: EvaluateStage, tokenizer: Any, count: int) -> list[Item]:
    """The first `count` recall items of the stage, set into its own text."""
    rng = random.Random(f"{settings.seed}/{RECALL}")
    return choices.recall_items(tokenizer, _documents(settings), rng, count, settings.prompt_tokens)


def story_rows(task: str, settings: EvaluateStage, tokenizer: Any, count: int) -> list[Item]:
    """All endings, or two names per story, of the embedded stories."""
    rng = random.Random(f"{settings.seed}/{task}")
    stories = load_stories(settings.chosen_split if settings.chosen_split in SPLITS else "test")
    return choices.ending_items(stories, rng) if task == ENDING else choices.name_items(stories, rng, NAMES_PER_STORY)


def long_rows(task: str, settings: EvaluateStage, tokenizer: Any, count: int) -> list[Item]:
    """The first `count` items of a long-context task, at --prompt_tokens and set into the stage's own text."""
    rng = random.Random(f"{settings.seed}/{task}")
    return long_items(task, tokenizer, _documents(settings), rng, count, settings.prompt_tokens)


def text_rows(task: str, settings: EvaluateStage, tokenizer: Any, count: int) -> list[Item]:
    """The first `count` items of a task that is set into the stage's own text, in its chat template if asked."""
    make = last_word_items if task == LAST_WORD else needle_items
    return make(task, _length(settings, tokenizer), _documents(settings), settings.seed, count)


def drawn_rows(task: str, settings: EvaluateStage, tokenizer: Any, count: int) -> list[Item]:
    """The first `count` items of a task of RULER that needs no text."""
    return DRAWN[task](task, _length(settings, tokenizer), settings.seed, count)


def reading_rows(task: str, settings: EvaluateStage, tokenizer: Any, count: int) -> list[Item]:
    """The first `count` questions on the records in --task_data, of the articles of the stage's split."""
    questions = read_questions(_records(task, settings.task_data), settings.chosen_split)
    return reading_items(task, _length(settings, tokenizer), questions, settings.seed, count)


def _length(settings: EvaluateStage, tokenizer: Any) -> PromptLength:
    if settings.apply_chat_template:
        check_chat_template(settings.model, tokenizer)
    return PromptLength(tokenizer, settings.prompt_tokens, settings.apply_chat_template)


def _records(task: str, place: str | None) -> list[Path]:
    """The files of SQuAD's records: --task_data itself, or those of `squad` in that folder."""
    if place is None:
        raise UserError(
            f"task {task} asks questions of SQuAD's form, and no file is given\n"
            "Give --task_data FILE.jsonl (id, article, context, question, answers), or a folder with squad.jsonl."
        )
    path = Path(place).expanduser()
    return [path] if path.is_file() else list(dict.fromkeys(find_files("squad", path).values()))


Maker = Callable[[Any, Any, int], list[Item]]
"""(settings, tokenizer, count) -> at most `count` items, the same ones first whatever the count."""

DRAWN = {"ruler_vt": tracking_items, "ruler_cwe": common_word_items, "ruler_fwe": frequent_word_items}
MAKERS: dict[str, Maker] = {
    RECALL: recall_rows,
    **{task: partial(story_rows, task) for task in (ENDING, NAME)},
    **{task: partial(long_rows, task) for task in LONG},
    **{task: partial(text_rows, task) for task in (*NIAH, LAST_WORD)},
    **{task: partial(drawn_rows, task) for task in DRAWN},
    **{task: partial(reading_rows, task) for task in ("ruler_qa", *READING)},
}
"""Task -> what makes its items; all other tasks are lm-eval's."""


def made_rows(task: str, settings: EvaluateStage, tokenizer: Any, count: int | None = None) -> list[Item]:
    """The first `count` items of a task of `MAKERS`, else --items of them; UserErrors name the text."""
    count = settings.items if count is None else count
    with text_named(settings.data, settings.chosen_split) if task in FROM_TEXT else nullcontext():
        return MAKERS[task](settings, tokenizer, count)


def local_files(settings: EvaluateStage) -> dict[str, Files | None]:
    """Task -> its files in --task_data, or None, for the tasks that are not made here. UserError where they are not
    there."""
    return {task: local_file(task, settings.task_data) for task in settings.tasks if task not in MAKERS}


def check_tasks(names: Sequence[str]) -> None:
    """UserError, with the nearest names, for tasks that neither we nor lm-eval know. lm-eval is imported only where a
    name is not known here."""
    others = [name for name in names if name not in MAKERS and name not in DECLARED]
    if not others:
        return
    from ftp_lightning.evaluation.harness.index import names_like, task_manager
    from ftp_lightning.evaluation.harness.made import unknown_task

    known = task_manager(others).all_tasks
    for name in others:
        if name not in known:
            raise unknown_task(name, [*MAKERS, *names_like(name)])


def local_file(task: str, folder: str | None) -> Files | None:
    return None if folder is None else find_files(task, folder)


def _write(path: Path, rows: list[Item]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
