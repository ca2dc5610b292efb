"""What a training window may hold, and in which shares in which phase."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ftp_lightning.data.recall import Fact, build_passage, draw_facts
from ftp_lightning.errors import UserError


@dataclass(frozen=True)
class Phase:
    """The share of the training's time a phase takes, and the weights of its four kinds of window."""

    time: float
    prose: float = 0.0
    passage: float = 0.0
    dense: float = 0.0
    repetition: float = 0.0


LAST = (0.30, 0.08, 0.32, 0.30)
# `recipe`: how the embedded model came about (1,000, 600, 500 and 2,161 steps). `direct`: only what recall came from.
PLANS = {
    "recipe": (Phase(0.235, 1.0), Phase(0.141, 0.5, 0.5), Phase(0.117, 0.34, 0.33, 0.33), Phase(0.507, *LAST)),
    "direct": (Phase(1.0, *LAST),),
}


def phase_at(plan: Sequence[Phase], done: float) -> Phase:
    """The phase that is on when the share `done` of the training is over."""
    for phase in plan:
        if done < phase.time:
            return phase
        done -= phase.time
    return plan[-1]


class Mixer:
    """Draws windows of `window` tokens from a text: all randomness from `rng`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], window: int, rng: random.Random
    ) -> None:
        self.tokenizer, self.window, self.rng = tokenizer, window, rng
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        # int32, not a list: 120 MB of books are 35 million tokens.
        self.books = torch.cat([torch.tensor([*self.encode(text), self.eos], dtype=torch.int32) for text in documents])
        if len(self.books) < 2 * window:
            raise UserError(
                f"the text has {len(self.books)} tokens, {2 * window} are needed\ngive more text or a shorter window"
            )

    def batch(self, phase: Phase, rows: int) -> Tensor:
        """(rows, window) int64 tokens, each row of a kind drawn by the phase's weights."""
        kinds: tuple[Callable[[], list[int]], ...] = (self.prose, self.passage, self.dense, self.repetition)
        weights = (phase.prose, phase.passage, phase.dense, phase.repetition)
        return torch.tensor([kind() for kind in self.rng.choices(kinds, weights, k=rows)])

    def prose(self) -> list[int]:
        """A stretch of the text."""
        return [self.bos, *self.stretch(self.window - 1)]

    def repetition(self) -> list[int]:
        """Stretches of 8-120 tokens (60 % random, otherwise prose), each said 2-4 times: induction comes from these."""
        ids = [self.bos]
        while len(ids) < self.window:
            length = self.rng.randint(8, min(120, self.window // 2))
            random_ids = [self.rng.randrange(3, len(self.tokenizer)) for _ in range(length)]
            ids += (random_ids if self.rng.random() < 0.6 else self.stretch(length)) * self.rng.randint(2, 4)
        return ids[: self.window]

    def dense(self) -> list[int]:
        """3-10 facts without filler, then all asked, or (35 %) all said again in another order; over and over."""
        text = ""
        while len(ids := [self.bos, *self.encode(text)]) < self.window:
            facts = draw_facts(self.rng, self.rng.randint(3, 10))
            again = self.rng.sample(facts, len(facts))
            text += ("\n" if text else "") + " ".join(fact.sentence for fact in facts)
            text += "\n" + " ".join(fact.sentence for fact in again) if self.rng.random() < 0.35 else questions(again)
        return ids[: self.window]

    def passage(self) -> list[int]:
        """2-8 facts set between sentences of a book, asked at the end; what room is left is prose."""
        facts = draw_facts(self.rng, self.rng.randint(2, max(2, min(8, self.window // 64))))
        room = self.window - 34 * len(facts)
        tokens = self.rng.randint(max(room // 3, 20 * len(facts)), max(room, 20 * len(facts) + 1))
        filler = self.tokenizer.decode(self.stretch(min(tokens + 128, len(self.books) - 1)), skip_special_tokens=True)
        asked = self.encode(questions(self.rng.sample(facts, len(facts))))
        try:
            ids = build_passage(self.rng, self.tokenizer, filler, facts, tokens).prompt_ids + asked
        except UserError:  # one endless sentence leaves no place for facts
            return self.prose()
        return (ids + [self.eos] + self.stretch(self.window))[: self.window]

    def stretch(self, length: int) -> list[int]:
        """`length` consecutive tokens from a random place of the text."""
        start = self.rng.randrange(len(self.books) - length)
        return self.books[start : start + length].tolist()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)


def questions(facts: Sequence[Fact]) -> str:
    """A line break, the question and its answer, for every fact."""
    return "".join(f"\n{fact.question}{fact.answer}" for fact in facts)
