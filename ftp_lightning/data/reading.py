"""Reading comprehension on SQuAD's records: one passage, or many; with a twin without the passage.

Records are JSONL: `id`, `article` (or SQuAD's `title`), `context`, `question`, `answers` (texts, or SQuAD's
`{"text": [...]}`). Articles are split by a hash, so that what is tuned on some can be tested on others. [ours]
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from ftp_lightning.data.prompt_length import Item, PromptLength
from ftp_lightning.data.records import jsonl_records
from ftp_lightning.data.sources import check_split, split_at
from ftp_lightning.errors import UserError


class Form(NamedTuple):
    """How a question is put: the prompt, the answer's first words, what stands between them, new tokens at least."""

    ask: str
    prefix: str
    delimiter: str = " "
    least_new: int = 0


ASK = "{context}\n\nQuestion: {question}"
PLAIN = Form(ASK, "Answer:", "\n")
CHAT = Form(f"Answer the question with words of the text.\n\n{ASK}", "", least_new=32)
"""In a chat template the model answers in a sentence of its own, and needs room for it."""
RULER = Form("", "Answer:")
"""Its prompt is lm-eval's."""


@dataclass(frozen=True)
class Question:
    """One record. `article` is what is split and what counts as a document."""

    id: str
    article: str
    passage: str
    question: str
    answers: tuple[str, ...]


def read_questions(paths: Sequence[Path], split: str) -> list[Question]:
    """The records whose article falls into `split` (one of calibration, training, validation, test, or all).

    Articles in the order of their hash are cut by the shares of `sources.SHARES`, so that even few fill every split.
    UserError for a broken record, with its line, and where no article falls into the split.
    """
    check_split(split)
    found = [question for path in paths for question in jsonl_records(path, _question)]
    articles = sorted({question.article for question in found}, key=lambda name: sha256(name.encode()).digest())
    chosen = {name for place, name in enumerate(articles) if split in ("all", split_at((place + 0.5) / len(articles)))}
    if not chosen:
        raise UserError(
            f"{paths[0]}: none of its {len(articles)} articles is in the split {split!r}\n"
            "Give --split all, or more records."
        )
    return [question for question in found if question.article in chosen]


def _question(record: Any) -> Question:
    if not isinstance(record, dict):
        raise ValueError("a record must be an object")
    texts: list[Any] = [record.get(key) for key in ("context", "question")]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("a record needs the texts 'context' and 'question'")
    answers = record.get("answers")
    answers = answers.get("text") if isinstance(answers, dict) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError("'answers' must hold at least one text")
    article = record.get("article", record.get("title", record["context"]))
    unique = tuple(dict.fromkeys(answer.strip() for answer in answers))
    return Question(str(record.get("id", record["question"])), str(article), texts[0].strip(), texts[1].strip(), unique)


def reading_items(task: str, length: PromptLength, questions: Sequence[Question], seed: Any, count: int) -> list[Item]:
    """`count` questions in an order drawn from the seed.

    squad: the passage alone; its twin is the question alone. squad_long and ruler_qa: the passage among others, as many
    as fit, that hold no gold answer; in the twin one more of them stands in its place.
    """
    order = list(questions)
    random.Random(f"{seed}/{task}").shuffle(order)
    make = {"squad": _alone, "squad_long": _among_others, "ruler_qa": _ruler}[task]
    return [
        make(task, length, question, questions, random.Random(f"{seed}/{task}/{question.id}"))
        for question in order[:count]
    ]


def _alone(task: str, length: PromptLength, question: Question, *_: Any) -> Item:
    form = CHAT if length.chat else PLAIN
    whole = form.ask.format(context=question.passage, question=question.question)
    return _item(task, length, question, (whole, f"Question: {question.question}"), form)


def _among_others(
    task: str, length: PromptLength, question: Question, questions: Sequence[Question], rng: random.Random
) -> Item:
    """Distractors are passages of other articles."""
    others = _passages(question, [other for other in questions if other.article != question.article])
    rng.shuffle(others)
    form = CHAT if length.chat else PLAIN

    def write(passages: Sequence[str]) -> str:
        return form.ask.format(context="\n\n".join(passages), question=question.question)

    return _mixed(task, length, question, others, write, form, rng)


def _ruler(
    task: str, length: PromptLength, question: Question, questions: Sequence[Question], rng: random.Random
) -> Item:
    """RULER's qa: numbered documents, those of the same article first, in lm-eval's words."""
    from lm_eval.tasks.ruler.qa_utils import DOCUMENT_PROMPT, TEMPLATE

    near, far = (
        _passages(question, [other for other in questions if (other.article == question.article) is same])
        for same in (True, False)
    )
    rng.shuffle(near)
    rng.shuffle(far)

    def write(passages: Sequence[str]) -> str:
        documents = [DOCUMENT_PROMPT.format(i=i, document=text) for i, text in enumerate(passages, 1)]
        return TEMPLATE.format(context="\n\n".join(documents), query=question.question)

    return _mixed(task, length, question, near + far, write, RULER, rng)


def _passages(question: Question, others: Sequence[Question]) -> list[str]:
    """Distinct passages beside the question's own that hold none of its answers."""
    golds = [answer.lower() for answer in question.answers]
    texts = dict.fromkeys(other.passage for other in others if other.passage != question.passage)
    return [text for text in texts if not any(gold in text.lower() for gold in golds)]


def _mixed(
    task: str,
    length: PromptLength,
    question: Question,
    others: Sequence[str],
    write: Callable[[Sequence[str]], str],
    form: Form,
    rng: random.Random,
) -> Item:
    """The passage at a random place among as many others as fit, and the same with another one in its place."""
    if not others:
        raise UserError(
            f"task {task}: question {question.id} has no other passage that lacks its answer\nGive more records."
        )
    *fill, instead = others
    share = rng.random()

    def texts(count: int) -> tuple[str, str]:
        place = int(share * (count + 1))
        mixed = [[*fill[:place], text, *fill[place:count]] for text in (question.passage, instead)]
        return write(mixed[0]), write(mixed[1])

    def longer(count: int) -> tuple[str, str]:
        return max(texts(count), key=length.count), form.prefix

    count = length.longest(task, longer, range(len(fill) + 1), form.delimiter)
    return _item(task, length, question, texts(count), form)


def _item(task: str, length: PromptLength, question: Question, texts: Sequence[str], form: Form) -> Item:
    longest = max(question.answers, key=len)
    return length.item(
        f"{task}-{question.id}", texts, form.prefix, question.answers, longest, form.delimiter, form.least_new,
        distance=length.after(texts[0], question.passage, form.prefix, form.delimiter), document=question.article,
    )  # fmt: skip
