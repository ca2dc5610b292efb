"""The last word of a passage, after LAMBADA (Paperno et al. 2016, arXiv 1606.06031), from any text. [ours]

LAMBADA's words were chosen by people, who could guess them from the whole passage and not from the last sentence. Here
a word counts where it ends a sentence and stood in the passage before; the twin is the last sentence alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

from ftp_lightning.data.prompt_length import Item, PromptLength
from ftp_lightning.data.text import sentences_of
from ftp_lightning.errors import UserError

LEAST_WORDS = 50
LEAST_LETTERS = 4
LEAST_SENTENCE = 3
"""Tokens of a sentence at the least, to bound how many are tried."""
_LAST = re.compile(rf"^(.+) ([A-Za-z]{{{LEAST_LETTERS},}})[.!?][\"'”’)]*$")


def last_word_items(task: str, length: PromptLength, documents: Sequence[str], seed: Any, count: int) -> list[Item]:
    """At most `count` passages of at least 50 words and up to the limit's tokens, each with another last sentence.

    UserError where the text has none.
    """
    texts = [sentences_of(text) for text in documents]
    places = [(number, last) for number, text in enumerate(texts) for last in range(1, len(text))]
    random.Random(f"{seed}/{task}").shuffle(places)
    made = (_item(task, length, texts[number], number, last) for number, last in places)
    items = list(islice((item for item in made if item is not None), count))
    if not items:
        raise UserError(
            f"task {task}: no sentence of the text ends in a word that stood in the {LEAST_WORDS} words before it\n"
            "Give more text, or more --prompt_tokens."
        )
    return items


def _item(task: str, length: PromptLength, sentences: Sequence[str], document: int, last: int) -> Item | None:
    """The longest passage that ends with a sentence; None where it is too short, or its last word not in it before."""
    match = _LAST.match(sentences[last])
    if match is None:
        return None
    beginning, word = match.groups()

    def text(size: int) -> tuple[str, str]:
        return " ".join([*sentences[last - size : last], beginning]), ""

    most = min(last, length.limit // LEAST_SENTENCE)
    try:
        context, _ = text(length.longest(task, text, range(most + 1)))
    except UserError:  # the sentence alone is longer than the prompt
        return None
    before = context.removesuffix(beginning)
    mentions = list(re.finditer(rf"\b{word}\b", before))
    if len(context.split()) < LEAST_WORDS or not mentions:
        return None
    return {
        "id": f"{task}-{document}-{last}",
        "context": context,
        "context_deleted": beginning,
        "target": word,
        "tokens": (tokens := length.count(context)),
        "new_tokens": len(length.tokenizer.encode(f" {word}", add_special_tokens=False)),
        "kind": None,
        "distance": tokens - length.count(context[: mentions[-1].end()]),
        "document": document,
    }
