"""Prompts and their parts: what is fitted, what is chosen on, what is promised on, and what confirms it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ftp_lightning.data.prompts import NoPrompt, load_prompts, text_windows
from ftp_lightning.data.rows import Row, Rows
from ftp_lightning.data.sources import MANY_DOCUMENTS, has_records, read_records, split_at
from ftp_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARES = {"fit": 0.15, "choice": 0.15, "validation": 0.50, "held_out": 0.20}
"""Part -> share of the prompts [ours]. Fit and choice together are the calibration prompts."""
LEAST = 30
"""Prompts without which nothing can be told [ours]: 15 of them validate, and show 79.6 % at most."""
LOOPING = 12
"""Tokens that an answer must have to be called one that repeats itself [ours]."""


def read_prompts(
    source: str, tokenizer: PreTrainedTokenizerBase, window: int, most: int, limit: int | None, seed: int
) -> Rows:
    """At most `limit` prompts of `source`, each once and without an answer, in a random order that `seed` decides.

    Records (`data.prompts.load_prompts`) keep their own length, and each is a document. Plain text, also in records
    that have nothing else, is cut into prompts of `window` tokens; of fewer than 20 documents each prompt counts as
    one, since there would be nothing to split.

    Args:
        source: JSON(L) of records, a text file, a folder of them, a Hub data set, or `embedded`.
        window: tokens of a prompt that is cut from text.
        most: tokens of the longest prompt that leaves room for an answer; longer ones are left out and counted.

    Raises:
        UserError: fewer than `LEAST` prompts are left, with what was left out.
    """
    if has_records(source) and not _only_text(source):
        found = _records(source, tokenizer, most)
    else:
        found = text_windows(source, "all", tokenizer, min(window, most), 1, None, seed)
        if len(set(found.documents)) < MANY_DOCUMENTS:
            found = replace(found, rows=[replace(row, document=place) for place, row in enumerate(found.rows)])
    first = {tuple(row.prompt): row for row in reversed(found.rows)}
    rows = [replace(row, continuation=[]) for row in found.rows if first[tuple(row.prompt)] is row]
    left_out = {**found.left_out, "repeated": len(found) - len(rows)}
    check_enough(source, rows, left_out, most)
    return Rows(rows, left_out).sample(limit, seed)


def _records(source: str, tokenizer: PreTrainedTokenizerBase, most: int) -> Rows:
    try:
        return load_prompts(source, "all", tokenizer, most, answers=False)
    except NoPrompt:
        raise UserError(
            f"{source} holds no prompt to use: each is without words or has more than the {most} tokens that leave "
            "room for an answer\nGive other prompts, or fewer --continuation_tokens."
        ) from None
    except UserError as error:
        if (advice := ": take --rows windows") in str(error):  # a flag of other stages
            raise UserError(str(error).replace(advice, ", other records have one")) from None
        raise


def check_enough(source: str, rows: list[Row], left_out: Any, most: int) -> None:
    """UserError where fewer than `LEAST` prompts are left."""
    if len(rows) >= LEAST:
        return
    names = {
        "long_prompt": f"longer than {most} tokens",
        "empty_prompt": "without words",
        "repeated": "repeated",
        "empty_answer": "answered by nothing",
    }
    told = ", ".join(f"{count} {names.get(name, name)}" for name, count in left_out.items() if count)
    raise UserError(
        f"{source} holds {len(rows)} prompts to use{f' ({told} left out)' if told else ''}, at least {LEAST} are needed"
        "\nGive more prompts."
    )


def _only_text(source: str) -> bool:
    """Whether all records hold plain text alone; what is no record is told when the text is read."""
    asked = {"messages", "prompt", "instruction"}

    def only_text(record: Any) -> bool:
        return not isinstance(record, Mapping) or ("text" in record and not asked & set(record))

    return all(read_records(source, only_text))


def split_rows(rows: Rows, seed: int) -> dict[str, Rows]:
    """Part -> its rows. All rows of a document go to one part; `seed` shuffles the documents."""
    sizes = Counter(rows.documents)
    order = sorted(sizes)
    random.Random(f"{seed}/tune").shuffle(order)
    part_of, before = {}, 0.0
    for document in order:
        part_of[document] = split_at((before + sizes[document] / 2) / len(rows), SHARES)
        before += sizes[document]
    places: dict[str, list[int]] = {name: [] for name in SHARES}
    for place, row in enumerate(rows.rows):
        places[part_of[row.document]].append(place)
    return {name: rows.subset(found) for name, found in places.items()}


def check_texts(parts: dict[str, Rows]) -> None:
    """UserError where a part is empty, or where the validation prompts are of one text: then nothing can be shown."""
    texts = {part: len(set(rows.documents)) for part, rows in parts.items()}
    for part, count in texts.items():
        if count < (least := 2 if part == "validation" else 1):
            raise UserError(
                f"the prompts come from {sum(texts.values())} texts: {count} of these are left for the "
                f"{part.replace('_', '-')} prompts, at least {least} must be, because one text goes to one part as a "
                "whole\nGive more texts, or cut the longest ones into several."
            )


def check_answers(rows: Rows) -> None:
    """UserError where the answers of a model say nothing about what it keeps: more than half of them run in a circle,
    or all of them are the same."""
    looping = sum(repeats(row.continuation) for row in rows.rows)
    if 2 * looping > len(rows):
        raise UserError(
            f"the model repeats itself in {looping} of {len(rows)} answers: to keep them would say nothing\n"
            "End the prompts as the model expects it (a chat template), or give fewer --continuation_tokens."
        )
    if len({tuple(row.continuation) for row in rows.rows}) == 1:
        raise UserError(
            f"the model repeats itself: it gives the same answer to all {len(rows)} prompts\n"
            "Give prompts that are answered differently."
        )


def repeats(answer: list[int]) -> bool:
    """Whether the second half of an answer goes round in a circle of at most a quarter of its tokens."""
    length = len(answer)
    return length >= LOOPING and any(
        all(answer[place] == answer[place - period] for place in range(length // 2, length))
        for period in range(1, length // 4 + 1)
    )
