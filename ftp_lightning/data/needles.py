"""RULER's needles in a haystack (Hsieh et al. 2024, arXiv 2404.06654), by lm-eval's definitions.

lm-eval's own maker asks the Hub for essays and for a tokenizer of sentences. Here the haystack is the stage's text and
its sentences are ours [ours]; wording, keys, values, depths and the order of drawing are lm-eval's
(lm_eval/tasks/ruler/prepare_niah.py and niah_utils.py, Apache-2.0).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from ftp_lightning.data.filler import Filler
from ftp_lightning.data.prompt_length import Item, PromptLength
from ftp_lightning.data.text import sentences_of
from ftp_lightning.errors import UserError

TEMPLATE = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz you"
    " about the {type_needle_v} afterwards.\n{context}\n"
    "What are all the special magic {type_needle_v} for {query} mentioned in the provided text?"
)
NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
PREFIX = "The special magic {type_needle_v} for {query} mentioned in the provided text {verb}"
ONE = (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer"))
"""What lm-eval replaces in the template, in this order, where one value is asked for."""
DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""Percent of the haystack before a needle."""
DIGITS = 7


@dataclass(frozen=True)
class Needles:
    """How many keys have how many values each, and how many keys are asked for."""

    keys: int = 1
    values: int = 1
    asked: int = 1


NIAH = {
    "ruler_niah_single": Needles(),
    "ruler_niah_multikey": Needles(keys=4),
    "ruler_niah_multivalue": Needles(values=4),
    "ruler_niah_multiquery": Needles(keys=4, asked=4),
}
"""lm-eval's niah_single_2, niah_multikey_1, niah_multivalue and niah_multiquery."""


def needle_items(
    task: str, length: PromptLength, documents: Sequence[str], seed: Any, count: int, shape: Needles | None = None
) -> list[Item]:
    """`count` items of a task of `NIAH`, or of another shape. `document` is the one that the haystack starts in."""
    filler, shape = Filler(length.tokenizer, documents), shape or NIAH[task]
    rngs = [random.Random(f"{seed}/{task}/{number}") for number in range(count)]
    return [_item(task, number, shape, length, filler, rng) for number, rng in enumerate(rngs)]


def _item(task: str, number: int, shape: Needles, length: PromptLength, filler: Filler, rng: random.Random) -> Item:
    prose, document = filler.draw(rng, length.limit)
    sentences = sentences_of(prose)
    keys = _keys(rng, shape.keys)
    values = {key: [_number(rng) for _ in range(shape.values)] for key in keys}
    needles = [NEEDLE.format(type_needle_v="numbers", key=key, value=value) for key in keys for value in values[key]]
    rng.shuffle(needles)
    depths = sorted(rng.sample(DEPTHS, len(needles)))
    queried = rng.sample(keys, shape.asked)
    ask, prefix = _wording(queried, shape)
    outputs = [value for key in queried for value in values[key]]

    def asked(size: int, hidden: Sequence[str]) -> tuple[str, str]:
        return ask.replace("{context}", _haystack(sentences[:size], hidden, depths)), prefix

    texts = []
    for hidden in (needles, []):
        make = partial(asked, hidden=hidden)
        texts.append(make(length.longest(task, make, range(1, len(sentences) + 1)))[0])
    first = next(needle for needle in _ordered(texts[0], needles) if any(key in needle for key in queried))
    return length.item(
        f"{task}-{number}", texts, prefix, outputs, ", ".join(outputs),
        distance=length.after(texts[0], first, prefix), document=document,
    )  # fmt: skip


def _haystack(sentences: Sequence[str], needles: Sequence[str], depths: Sequence[int]) -> str:
    """Needles between sentences, the i-th after depths[i] percent of them."""
    places = [0, *(int(len(sentences) * depth / 100) for depth in depths), len(sentences)]
    pieces: list[str] = []
    for number, needle in enumerate(needles):
        pieces += [*sentences[places[number] : places[number + 1]], needle]
    return " ".join([*pieces, *sentences[places[len(needles)] if needles else 0 :]])


def _ordered(text: str, needles: Sequence[str]) -> list[str]:
    return sorted(needles, key=text.index)


def _wording(queried: Sequence[str], shape: Needles) -> tuple[str, str]:
    """The prompt around "{context}", and the first words of the answer."""
    template, kind, verb = TEMPLATE, "numbers", "are"
    if shape.asked * shape.values == 1:
        for several, one in ONE:
            template = template.replace(several, one)
        kind, verb = "number", "is"
    query = ", ".join(queried[:-1]) + ", and " + queried[-1] if len(queried) > 1 else queried[0]
    ask = template.format(type_needle_v=kind, query=query, context="{context}")
    return ask, PREFIX.format(type_needle_v=kind, query=query, verb=verb)


def _number(rng: random.Random) -> str:
    return str(rng.randint(10 ** (DIGITS - 1), 10**DIGITS - 1))


def _keys(rng: random.Random, count: int) -> list[str]:
    """RULER's keys: an adjective and a noun."""
    kinds = word_lists()
    chosen = (rng.sample(kinds[kind], count) for kind in ("adjectives", "nouns"))
    return ["-".join(pair) for pair in zip(*chosen, strict=True)]


@cache
def word_lists() -> dict[str, list[str]]:
    """The words of the package `wonderwords`, which RULER draws from, by kind. UserError where it is not installed."""
    try:
        from wonderwords import RandomWord  # type: ignore[import-untyped]
    except ImportError:
        raise UserError(
            "RULER's tasks draw their words from the package wonderwords, which is not installed\n"
            "Install it: pip install wonderwords"
        ) from None
    return RandomWord()._categories
