"""Filler: stretches of prose long enough for a passage, from random places of the documents."""

import random
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain

from transformers import PreTrainedTokenizerBase

from ftp_lightning.data.text import sentences_of, tokens_within
from ftp_lightning.errors import UserError

_MARGIN = 8  # tokens beyond need: sentences counted one by one and the joined text may differ by a few


class Filler:
    """The sentences of all documents, to draw stretches from. Raises UserError where there are none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.sentences = [sentences_of(text) for text in documents]
        self.cumulative = list(accumulate(map(len, self.sentences)))
        if not any(self.sentences):
            raise UserError("the text has no sentences to set facts between\nGive more text")

    def draw(self, rng: random.Random, tokens: int) -> tuple[str, int]:
        """Sentences of at least `tokens` tokens, joined by spaces, and the index of the document they start in.

        The start is a random sentence, each equally likely, moved to an earlier one where too little text follows; a
        document that is too short as a whole runs into the next ones (round from the last to the first).
        Raises UserError where all documents together are too short.
        """
        document = rng.choices(range(len(self.sentences)), cum_weights=self.cumulative)[0]
        own = self.sentences[document]
        start, need = rng.randrange(len(own)), tokens + _MARGIN
        stretch, found = self._take(own[start:], need)
        while found < need and start > 0:
            start -= 1
            stretch, found = [own[start], *stretch], found + tokens_within(self.tokenizer, own[start])
        others = chain.from_iterable([*self.sentences[document + 1 :], *self.sentences[:document]])
        rest, more = self._take(others, need - found)
        if found + more < tokens:
            raise UserError(
                f"the text has {found + more} tokens, {tokens} are needed\nGive more text or shorter prompts"
            )
        return " ".join(stretch + rest), document

    def _take(self, sentences: Iterable[str], tokens: int) -> tuple[list[str], int]:
        """The first sentences that hold at least `tokens` tokens, or all, and how many they hold."""
        taken: list[str] = []
        found = 0
        for sentence in sentences:
            if found >= tokens:
                break
            taken.append(sentence)
            found += tokens_within(self.tokenizer, sentence)
        return taken, found
