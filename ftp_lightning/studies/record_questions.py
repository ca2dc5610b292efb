"""The questions of the record on real models: needles in books, reading comprehension, and the model's own answers.

Books and articles of one split are asked about in no other. Which questions there are follows from the split and the
model's `Asked` alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftp_lightning.data.needles import Needles, needle_items
from ftp_lightning.data.prompt_length import PromptLength
from ftp_lightning.data.reading import ASK, CHAT, read_questions
from ftp_lightning.data.reading import Question as Reading
from ftp_lightning.data.template import rendered
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.replayed import Question
from ftp_lightning.studies.other_prompts import KINDS, other_prompts

NEW_TOKENS = 24
PROSE = (200, 800)
"""Tokens of a passage that is to be continued."""


@dataclass(frozen=True)
class Asked:
    """What a model is asked.

    Attributes:
        counts: task -> items. "needles-LOW-HIGH" is a haystack of so many tokens; "xquad" has gold answers. Elsewhere
            the dense model's answer counts: "own" asks other questions of the same kind, "prose" continues a passage,
            and the rest are kinds of `other_prompts`.
        keys: needles in a haystack, of which one is asked for. needle_tokens: the longest answer to that.
        chat: whether prompts are put into the chat template.
    """

    counts: tuple[tuple[str, int], ...]
    keys: int = 4
    needle_tokens: int = NEW_TOKENS
    chat: bool = True

    @property
    def fitted_on(self) -> list[str]:
        """The tasks that maps are fitted on: all but the kinds of `other_prompts`."""
        return [task for task, _ in self.counts if task not in KINDS]


@dataclass(frozen=True)
class Sources:
    """Where questions come from: BOOKS/SPLIT/*.txt, a file of SQuAD's records, and a folder of tasks' files."""

    books: str
    squad: str
    tasks: str = ""

    def texts(self, split: str) -> list[str]:
        files = sorted((Path(self.books).expanduser() / split).glob("*.txt"))
        if not files:
            raise UserError(f"there is no book in {self.books}/{split}\nGive --books a folder of folders")
        return [file.read_text(encoding="utf-8") for file in files]

    def readings(self, split: str) -> list[Reading]:
        """In an order drawn from the split."""
        found = read_questions([Path(self.squad).expanduser()], split)
        random.Random(split).shuffle(found)
        return found


def record_questions(
    tokenizer: Any, asked: Asked, sources: Sources, split: str, task: str, first: int = 0, count: int | None = None
) -> list[Question]:
    """The questions of one task of a split, or `count` of them from number `first` on."""
    counts = dict(asked.counts)
    write, last = _writer(tokenizer, asked.chat), counts[task] if count is None else min(counts[task], first + count)
    if task.startswith("needles"):
        low, high = map(int, task.split("-")[1:])
        return _needles(tokenizer, write, sources.texts(split), split, range(first, last), (low, high), asked)
    if task == "prose":
        return _prose(tokenizer, sources.texts(split), split, last)[first:]
    if task in KINDS:
        prompts = other_prompts(task, sources.tasks, last)
        return [Question(write(prompt), document, NEW_TOKENS) for document, prompt in prompts[first:]]
    readings = sources.readings(split)
    if task == "xquad":
        ask = f"{CHAT.ask}" if asked.chat else f"{ASK}\nAnswer:"
        alone = "{question}" if asked.chat else "Question: {question}\nAnswer:"
        return [
            Question(
                write(ask.format(context=one.passage, question=one.question)), one.article, NEW_TOKENS, one.answers,
                write(alone.format(question=one.question)),
            )
            for one in readings[first:last]
        ]  # fmt: skip
    before = counts.get("xquad", 0)
    return [
        Question(write(f"{ASK}\nAnswer:".format(context=one.passage, question=one.question)), one.article, NEW_TOKENS)
        for one in readings[before + first : before + last]
    ]


def _writer(tokenizer: Any, chat: bool) -> Callable[..., tuple[int, ...]]:
    """From the words of a prompt, and the first ones of its answer, to tokens."""

    def plain(text: str, prefix: str = "") -> tuple[int, ...]:
        return tuple(tokenizer.encode(f"{text} {prefix}" if prefix else text, verbose=False))

    def templated(text: str, prefix: str = "") -> tuple[int, ...]:
        messages = [{"role": "user", "content": text}]
        if prefix:
            messages.append({"role": "assistant", "content": prefix})
        ending = {"continue_final_message": True} if prefix else {"add_generation_prompt": True}
        text = rendered(tokenizer, messages, **ending)
        return tuple(tokenizer.encode(text, add_special_tokens=False, verbose=False))

    return templated if chat else plain


def _needles(
    tokenizer: Any,
    write: Callable[..., tuple[int, ...]],
    texts: Sequence[str],
    split: str,
    numbers: range,
    tokens: tuple[int, int],
    asked: Asked,
) -> list[Question]:
    rng = random.Random(f"len{split}")
    lengths, found = [rng.randint(*tokens) for _ in range(numbers.stop)], []
    for number in numbers:
        length = PromptLength(tokenizer, lengths[number], asked.chat)
        about = ("ruler_niah_multikey", length, texts, f"{split}-{number}", 1, Needles(keys=asked.keys))
        (item,) = needle_items(*about)
        ids, book = write(item["context"], item["gen_prefix"]), str(item["document"])
        found.append(Question(ids, book, asked.needle_tokens, tuple(item["outputs"])))
    return found


def _prose(tokenizer: Any, texts: Sequence[str], split: str, count: int) -> list[Question]:
    """Passages of all books in turn, cut anywhere."""
    rng, found = random.Random(f"prose-{split}"), []
    for number in range(count):
        book = number % len(texts)
        text, tokens = texts[book], rng.randint(*PROSE)
        start = text.find(" ", rng.randrange(max(1, len(text) - 6 * tokens))) + 1
        ids = tokenizer.encode(text[start : start + 6 * tokens], verbose=False)[:tokens]
        found.append(Question(tuple(ids), str(book), NEW_TOKENS))
    return found
