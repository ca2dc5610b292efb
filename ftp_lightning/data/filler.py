"""Filler: a stretch of prose long enough for a passage, from a random place of the documents."""

import random
from collections.abc import Sequence
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from ftp_lightning.data.text import sentences_of
from ftp_lightning.errors import UserError

_MARGIN = 8  # tokens beyond need: sentences counted one by one and the joined text may differ by a few


def draw_filler(
    rng: random.Random, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], tokens: int
) -> tuple[str, int]:
    """Sentences of at least `tokens` tokens, joined by spaces, and the index of the document they start in.

    The start is a random sentence (each equally likely) of those with enough text before their document ends; where a document is
    shorter than that, its stretch starts at its beginning and runs into the next ones (round from the last to the first).
    Raises UserError where all documents together are too short.
    """
    sentences = [sentences_of(text) for text in documents]
    if not any(sentences):
        raise UserError(f"the filler has 0 tokens, {tokens} are needed\ngive more text or shorter prompts")
    document = rng.choices(range(len(documents)), cum_weights=list(accumulate(map(len, sentences))))[0]
    own = sentences[document]
    start = rng.randrange(len(own))
    later = [sentence for text in (*sentences[document + 1 :], *sentences[:document]) for sentence in text]
    stretch, found = _take(tokenizer, own[start:], tokens + _MARGIN)
    while found < tokens + _MARGIN and start > 0:  # too near the end: begin earlier in the same document
        start -= 1
        stretch, found = [own[start], *stretch], found + _length(tokenizer, own[start])
    rest, more = _take(tokenizer, later, tokens + _MARGIN - found)
    if found + more < tokens:
        raise UserError(f"the filler has {found + more} tokens, {tokens} are needed\ngive more text or shorter prompts")
    return " ".join(stretch + rest), document


def _take(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], tokens: int) -> tuple[list[str], int]:
    """The first sentences that hold at least `tokens` tokens, or all, and how many they hold."""
    taken, found = [], 0
    for sentence in sentences:
        if found >= tokens:
            break
        taken.append(sentence)
        found += _length(tokenizer, sentence)
    return taken, found


def _length(tokenizer: PreTrainedTokenizerBase, sentence: str) -> int:
    return len(tokenizer.encode(" " + sentence, add_special_tokens=False))
