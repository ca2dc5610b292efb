"""Recall passages: facts about people set between sentences of prose, to be asked for at the end. [ours]

Names, objects and places are drawn at random, so the answer is nowhere but in the prompt: a pruner that loses the
fact loses the answer. Sentences, questions and word pools are those the embedded model was trained on (`words.py`,
`assets/llama/README.md`).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ftp_lightning.data.text import leading_ids, sentences_of, tokens_within
from ftp_lightning.data.words import FORMS, KINDS, NAMES
from ftp_lightning.errors import UserError

_MARGIN = 4  # tokens: parts counted one by one and the joined text may differ by a few


@dataclass(frozen=True)
class Fact:
    """A fact as stated and as asked; `answer` is like " barn.", with space and full stop, `key` = (kind, subject)."""

    kind: str
    sentence: str
    question: str
    answer: str
    key: tuple[str, str]


@dataclass(frozen=True)
class Passage:
    """Facts in prose as token ids: `prompt_ids` with them, `deleted_ids` the same prose without, both equally long.

    `fact_ends[i]` is the index of the first token after `facts[i]`; facts stand in the order of the passage.
    """

    prompt_ids: list[int]
    deleted_ids: list[int]
    facts: list[Fact]
    fact_ends: list[int]


def fact_count(rng: random.Random, prompt_tokens: int) -> int:
    """How many facts a prompt takes: 4 to 6, in short ones about one per 32 tokens, at least 2 [ours]."""
    return max(2, min(rng.randint(4, 6), prompt_tokens // 32))


def draw_facts(rng: random.Random, count: int, kinds: Sequence[str] | None = None) -> list[Fact]:
    """`count` random facts in random order, whose answers can be confused with each other.

    Without `kinds`, count // 2 kinds (at most all five) are drawn, so from two facts on every kind occurs at least
    twice and a fact's distractors stand in the same passage. Within a kind no subject, no thing and no answer comes
    twice. Raises ValueError for count < 1, unknown kinds, or more facts of a kind than its smallest pool has words.
    """
    if count < 1 or not set(kinds or KINDS) <= set(KINDS):
        raise ValueError(f"cannot draw {count} facts of kinds {kinds}; count must be >= 1 and kinds among {KINDS}")
    chosen = list(kinds) if kinds else rng.sample(KINDS, max(1, min(count // 2, len(KINDS))))
    shares = [count // len(chosen) + (i < count % len(chosen)) for i in range(len(chosen))]
    facts = [fact for kind, share in zip(chosen, shares, strict=True) for fact in _draw_kind(rng, kind, share)]
    rng.shuffle(facts)
    return facts


def _draw_kind(rng: random.Random, kind: str, count: int) -> list[Fact]:
    form = FORMS[kind]
    pools = [pool for pool in (NAMES, form.answers, form.things) if len(pool) > 1]
    if count > min(len(pool) for pool in pools):
        raise ValueError(
            f"{count} facts of kind {kind!r} are too many for pools of {[len(pool) for pool in pools]} words"
        )
    names = rng.sample(NAMES, count)
    answers = rng.sample([word for word in form.answers if word not in names], count)
    things = rng.sample(form.things, count) if len(form.things) > 1 else [""] * count
    return [_make(kind, *words) for words in zip(names, things, answers, strict=True)]


def _make(kind: str, name: str, thing: str, answer: str) -> Fact:
    words = {"name": name, "thing": thing, "answer": answer}
    form = FORMS[kind]
    return Fact(kind, form.sentence.format(**words), form.question.format(**words), f" {answer}.", (kind, name))


def distractors(fact: Fact, facts: Sequence[Fact], rng: random.Random, count: int = 3) -> list[str]:
    """`count` wrong answers to `fact`: those of its kind in `facts` first, then of the pool, never the right one."""
    near = [other.answer for other in facts if other.kind == fact.kind and other.answer != fact.answer]
    pool = [f" {word}." for word in FORMS[fact.kind].answers]
    far = [answer for answer in pool if answer != fact.answer and answer not in near]
    return (rng.sample(near, len(near)) + rng.sample(far, min(count, len(far))))[:count]


def build_passage(
    rng: random.Random,
    tokenizer: PreTrainedTokenizerBase,
    filler: str,
    facts: Sequence[Fact],
    prompt_tokens: int,
    tail_tokens: int = 0,
) -> Passage:
    """Facts set at random between the last sentences of `filler`, as exactly `prompt_tokens` ids, BOS included.

    The prose is cut at its beginning, by tokens, so both versions end on the filler's last sentence; `deleted_ids`
    holds as many more tokens of earlier filler as the facts took. Some prose always stands before the first fact and
    no fact ends within the last `tail_tokens` tokens. Raises UserError where the filler is shorter than the passage or
    the facts leave no room.
    """
    bos = leading_ids(tokenizer)
    room = prompt_tokens - len(bos)
    sentences = sentences_of(filler)
    deleted = _ids(tokenizer, " ".join(sentences))
    if len(deleted) < room:
        raise UserError(
            f"a passage of {prompt_tokens} tokens needs {room} tokens of filler; this text has {len(deleted)}"
        )
    prose = room - sum(tokens_within(tokenizer, fact.sentence) for fact in facts)
    after = _tokens_after(tokenizer, sentences, prose + _MARGIN)
    gaps = [gap for gap, tokens in enumerate(after) if tail_tokens <= tokens <= prose - _MARGIN]
    if not gaps:
        raise UserError(
            f"{len(facts)} facts and a tail of {tail_tokens} do not fit into a prompt of {prompt_tokens} tokens"
        )
    pieces = _weave(sentences[-len(after) :], facts, [rng.choice(gaps) for _ in facts])
    ids, ends = _encode_pieces(tokenizer, pieces)
    cut = len(ids) - room
    ordered = [piece for piece in pieces if isinstance(piece, Fact)]
    return Passage(bos + ids[cut:], bos + deleted[-room:], ordered, [end - cut + len(bos) for end in ends])


def _tokens_after(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], room: int) -> list[int]:
    """Filler tokens after gap 0, 1, ... (= sentences after it), for the fewest last sentences that fill `room`."""
    after, total = [], 0
    for sentence in reversed(sentences):
        if total >= room:
            break
        after.append(total)
        total += tokens_within(tokenizer, sentence)
    return after


def _weave(sentences: Sequence[str], facts: Sequence[Fact], gaps: Sequence[int]) -> list[str | Fact]:
    """Sentences and facts in reading order; fact i stands where gaps[i] sentences follow."""
    pieces: list[str | Fact] = []
    for following, sentence in zip(range(len(sentences) - 1, -1, -1), sentences, strict=True):
        pieces.append(sentence)
        pieces += [fact for fact, gap in zip(facts, gaps, strict=True) if gap == following]
    return pieces


def _encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str | Fact]) -> tuple[list[int], list[int]]:
    """Ids of the pieces joined by spaces, and for every fact among them the number of ids up to its end."""
    text, ends = "", []
    for piece in pieces:
        text += (" " if text else "") + (piece.sentence if isinstance(piece, Fact) else piece)
        if isinstance(piece, Fact):
            ends.append(len(_ids(tokenizer, text)))
    return _ids(tokenizer, text), ends


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)
