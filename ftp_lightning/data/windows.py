"""Windows: rows of exactly P prompt tokens and C continuation tokens, cut from text.

Two kinds: `plain` rows are prose; `recall` rows end in questions whose answers stand only in the prompt (see
`recall.py`).
"""

import math
import random
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ftp_lightning.data.filler import Filler
from ftp_lightning.data.recall import Fact, build_passage, draw_facts, fact_count
from ftp_lightning.data.rows import Row, Rows
from ftp_lightning.data.text import leading_ids
from ftp_lightning.errors import UserError


def plain_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    prompt_tokens: int,
    continuation_tokens: int,
    count: int | None,
    rng: random.Random,
) -> Rows:
    """Rows of prose, each with BOS in front (if the tokenizer adds one).

    Documents shorter than a window are packed, EOS after each; longer ones are cut on their own, so that no row
    crosses their end. `count=None`: all consecutive windows from each beginning, in order. Otherwise `count` random
    ones: a pass over the text gives windows that do not overlap, at random offsets, in random order; only when a pass
    is used up another begins, at other offsets. The first n of `count` rows are the same for every count >= n. Raises
    UserError where the text is shorter than one window.
    """
    bos = leading_ids(tokenizer)
    size = prompt_tokens + continuation_tokens - len(bos)
    tokens = [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in documents]
    first = _streams(tokens, size, tokenizer.eos_token_id, None)
    if not first:
        total = sum(map(len, tokens))
        raise UserError(f"the text has {total} tokens, one window needs {size}\nGive more text or shorter windows")
    rows = _cut(first, size, None) if count is None else []
    while count is not None and len(rows) < count:
        one_pass = _cut(_streams(tokens, size, tokenizer.eos_token_id, rng), size, rng)
        rows += rng.sample(one_pass, len(one_pass))
    rows = rows[:count]
    cells = ((bos + ids, document) for ids, document in rows)
    return Rows([Row(ids[:prompt_tokens], ids[prompt_tokens:], "plain", document) for ids, document in cells])


@dataclass(frozen=True)
class _Stream:
    """Tokens that windows may be cut from anywhere, and whose they are: document `owners[k]` from `starts[k]` on."""

    ids: list[int]
    starts: list[int]
    owners: list[int]

    def owner(self, at: int) -> int:
        return self.owners[bisect_right(self.starts, at) - 1]


def _streams(tokens: Sequence[list[int]], size: int, eos: int | None, rng: random.Random | None) -> list[_Stream]:
    """One stream per document that fills a window; all shorter ones make one more, which an rng shuffles."""
    streams = [_Stream(ids, [0], [i]) for i, ids in enumerate(tokens) if len(ids) >= size]
    short = [i for i, ids in enumerate(tokens) if 0 < len(ids) < size]
    if rng is not None:
        rng.shuffle(short)
    packed = _Stream([], [], short)
    for i in short:
        packed.starts.append(len(packed.ids))
        packed.ids.extend(tokens[i] if eos is None else [*tokens[i], eos])
    return [*streams, packed] if len(packed.ids) >= size else streams


def _cut(streams: Iterable[_Stream], size: int, rng: random.Random | None) -> list[tuple[list[int], int]]:
    """Consecutive windows of `size` tokens, each with the document of its first; an rng draws the offset."""
    rows = []
    for stream in streams:
        offset = rng.randint(0, min(size - 1, len(stream.ids) - size)) if rng else 0
        for start in range(offset, len(stream.ids) - size + 1, size):
            rows.append((stream.ids[start : start + size], stream.owner(start)))
    return rows


def recall_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    prompt_tokens: int,
    continuation_tokens: int,
    count: int,
    rng: random.Random,
    kinds: Sequence[str] | None = None,
) -> Rows:
    """Rows whose prompt is a passage with 4-6 facts and one question; the continuation answers it and then asks for the
    other facts.

    So the prompt ends as it does in use, with a question that a router may look at, and the rest of the continuation
    needs facts that the prompt did not ask for: questions and answers of the other facts in random order, then of all
    in new orders, cut at C tokens. Filler comes from `documents`, from a random sentence on; the row's document is
    where it starts. Short prompts take fewer facts, see `recall.fact_count`; all are of `kinds` (default: drawn per
    passage). The first n rows are the same for every count >= n.
    """
    filler, rows = Filler(tokenizer, documents), []
    for _ in range(count):
        prose, document = filler.draw(rng, prompt_tokens)
        facts = draw_facts(rng, fact_count(rng, prompt_tokens), kinds)
        rng.shuffle(facts)
        question = tokenizer.encode(f"\n{facts[0].question}", add_special_tokens=False)
        passage = build_passage(rng, tokenizer, prose, facts, prompt_tokens - len(question))
        answers = _answers(rng, tokenizer, facts, continuation_tokens)
        rows.append(Row(passage.prompt_ids + question, answers, "recall", document))
    return Rows(rows)


def _answers(rng: random.Random, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], length: int) -> list[int]:
    """Exactly `length` ids: the answer to the first fact's question, then question-answer lines."""
    text, asked = facts[0].answer, facts[1:]
    while len(ids := tokenizer.encode(text, add_special_tokens=False, verbose=False)) < length:
        text += "".join(f"\n{fact.question}{fact.answer}" for fact in rng.sample(asked, len(asked)))
        asked = facts
    return ids[:length]


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    prompt_tokens: int,
    continuation_tokens: int,
    count: int,
    seed: int,
    recall_share: float = 0.5,
    kinds: Sequence[str] | None = None,
) -> Rows:
    """What search, training and sensitivity look at: any first n rows hold floor(n * recall_share) of recall.

    Deterministic in `seed`; plain and recall rows draw from streams of their own, so a longer set begins with the
    shorter one.
    """
    if not 0 <= recall_share <= 1:
        raise ValueError(f"recall_share is {recall_share}, must be in [0, 1]")
    recalls = [math.floor(n * recall_share + 1e-9) for n in range(count + 1)]
    shape = (tokenizer, documents, prompt_tokens, continuation_tokens)
    plain = plain_windows(*shape, count - recalls[-1], random.Random(f"{seed}/plain"))
    recall = recall_windows(*shape, recalls[-1], random.Random(f"{seed}/recall"), kinds)
    steps = zip(recalls, recalls[1:])
    order = (len(plain) + before if now > before else n - before for n, (before, now) in enumerate(steps))
    return (plain + recall).subset(order)
