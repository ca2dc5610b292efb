"""RULER's variable tracking, common words and frequent words (Hsieh et al. 2024, arXiv 2404.06654), made by lm-eval's
own functions (lm_eval/tasks/ruler), drawn anew per item from a seed of its own.

[ours] lm-eval fits the length once per task, in steps of ten lines or words; here every item is as long as it can be.
The solved example before `ruler_vt` has one line of noise, not up to 500 tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from ftp_lightning.data.needles import word_lists
from ftp_lightning.data.prompt_length import Item, PromptLength

ASSIGNMENT = re.compile(r"VAR [A-Z]+ = (?:VAR [A-Z]+ |\d+) ?")
HOPS = 4
EXAMPLE_LINES = 1
LONG_PROMPT = 4096
"""From this length on lm-eval repeats common words 30 times and others 3 times, below it 6 times and once."""
COMMON = 10


def tracking_items(task: str, length: PromptLength, seed: Any, count: int) -> list[Item]:
    """`ruler_vt`: name all variables of a chain of assignments that is hidden in noise."""
    from lm_eval.tasks.ruler import vt_utils

    def made(name: str, lines: int, example: bool = False) -> tuple[str, str, list[str]]:
        with drawn_from(f"{seed}/{task}/{name}"):
            text, variables = vt_utils.generate_input_output(lines, 1, HOPS, is_icl=example)
        cut = text.rindex(" Answer: According to the chain(s)")
        return text[:cut], text[cut:].strip(), variables

    def item(number: int) -> Item:
        text, prefix, variables = made(f"{number}/example", EXAMPLE_LINES, example=True)
        solved = f"{text} {prefix} {' '.join(variables)}\n\n\n\n"

        def ask(lines: int, without: bool) -> tuple[str, str]:
            text, prefix, _ = made(str(number), lines)
            return solved + (ASSIGNMENT.sub("", text) if without else text), prefix

        texts = []
        for without in (False, True):
            make = partial(ask, without=without)
            texts.append(make(length.longest(task, make, range(1, length.limit)))[0])
        _, prefix, variables = made(str(number), 1)
        first = ASSIGNMENT.search(texts[0], len(solved))
        said, end = " ".join(variables), first.end() if first else 0
        distance = length.count(texts[0], prefix) - length.count(texts[0][:end])
        return length.item(f"{task}-{number}", texts, prefix, variables, said, distance=distance)

    return [item(number) for number in range(count)]


def common_word_items(task: str, length: PromptLength, seed: Any, count: int) -> list[Item]:
    """`ruler_cwe`: the ten words of a numbered list that occur most often."""
    word_lists()  # lm-eval's module draws from them when it is imported
    from lm_eval.tasks.ruler import cwe_utils

    template, prefix = cwe_utils.CONFIG["template"], cwe_utils.CONFIG["answer_prefix"].strip()
    repeats = (6, 1) if length.limit < LONG_PROMPT else (30, 3)

    def item(number: int) -> Item:
        def drawn(words: int) -> tuple[str, list[str]]:
            with drawn_from(f"{seed}/{task}/{number}") as cwe_utils.RNG:
                return cwe_utils.get_example(words, *repeats, COMMON)

        def others(words: int) -> str:
            rng, gold = random.Random(f"{seed}/{task}/{number}/others"), set(drawn(words)[1])
            left = [word for word in rng.sample(cwe_utils.WORDS, words + COMMON) if word not in gold]
            return " ".join(f"{place}. {word}" for place, word in enumerate(left[:words], 1))

        def ask(words: int, without: bool) -> tuple[str, str]:
            context = others(words) if without else drawn(words)[0]
            return template.format(context=context), prefix

        texts: list[str] = []
        common: list[str] = []
        sizes = range(COMMON + 1, len(cwe_utils.WORDS) - COMMON)
        for without in (False, True):
            make = partial(ask, without=without)
            size = length.longest(task, make, sizes, "\n\n")
            texts.append(make(size)[0])
            common = common or drawn(size)[1]
        said = " ".join(f"{place}. {word}" for place, word in enumerate(common, 1))
        return length.item(f"{task}-{number}", texts, prefix, common, said, delimiter="\n\n")

    return [item(number) for number in range(count)]


def frequent_word_items(task: str, length: PromptLength, seed: Any, count: int) -> list[Item]:
    """`ruler_fwe`: the three coded words that occur most often. The twin is a text of other coded words."""
    from lm_eval.tasks.ruler import fwe_utils

    def made(name: str, words: int) -> tuple[str, str, list[str]]:
        with drawn_from(f"{seed}/{task}/{name}"):
            text, answers, _ = fwe_utils.generate_input_output(
                2**60, length.tokenizer, num_words=words, vocab_size=max(5, length.limit // 50)
            )
        prefix = fwe_utils.CONFIG["answer_prefix"]
        return text[: text.rindex(prefix)].strip(), prefix.strip(), answers

    def item(number: int) -> Item:
        sizes = range(30, length.limit)
        makers = [partial(made, str(number)), partial(made, f"{number}/other")]
        (text, prefix, answers), (other, _, _) = (make(length.longest(task, make, sizes)) for make in makers)
        return length.item(f"{task}-{number}", (text, other), prefix, answers, ", ".join(answers))

    return [item(number) for number in range(count)]


@contextmanager
def drawn_from(seed: str) -> Iterator[random.Random]:
    """The global generators that lm-eval's makers draw from, seeded, and put back afterwards; and one more."""
    import numpy

    states = random.getstate(), numpy.random.get_state()
    rng = random.Random(seed)
    random.seed(seed)
    numpy.random.seed(rng.randrange(2**32))
    try:
        yield rng
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
