"""Multiple-choice items as plain dicts, one per JSONL line: recall, story endings, and who is meant. [ours]

Every item has `id, context, choices` (each with its leading space), `answer` (index of the right choice), `kind` and
`document`. Contexts are stored without BOS; `context + choice` is the text to score.
"""

import random
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from ftp_lightning.data.filler import Filler
from ftp_lightning.data.names import names_of
from ftp_lightning.data.recall import Fact, Passage, build_passage, distractors, draw_facts, fact_count
from ftp_lightning.data.stories import Story
from ftp_lightning.data.text import leading_ids, sentences_of
from ftp_lightning.errors import UserError

Item = dict[str, Any]
_TRIES = 100


def recall_items(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    rng: random.Random,
    count: int,
    prompt_tokens: int = 192,
    kinds: Sequence[str] | None = None,
) -> list[Item]:
    """`count` questions, each on a passage of its own: `prompt_tokens` tokens (BOS included), 4-6 facts.

    `kinds`: of which kinds the facts of every passage are; drawn per passage by default, see `recall.draw_facts`.

    `context` is the passage, a line break and the question; `context_deleted` the same with all facts replaced by
    more filler, so what is answered right there was not recalled. `distance` = tokens from the fact's end to the
    context's end. Short passages take fewer facts, see `recall.fact_count`. A passage whose text does not tokenise
    back to the very ids (its first word was cut within) is drawn again; after 100 tries a UserError.
    """
    filler, items = Filler(tokenizer, documents), []
    for number in range(count):
        for _ in range(_TRIES):
            item = _recall_item(tokenizer, filler, rng, prompt_tokens, fact_count(rng, prompt_tokens), kinds)
            if item is not None:
                break
        else:
            raise UserError(
                "this tokenizer does not give back the tokens of a decoded passage\nrecall items need one that does"
            )
        items.append({"id": f"recall-{number}", **item})
    return items


def _recall_item(
    tokenizer: PreTrainedTokenizerBase,
    filler: Filler,
    rng: random.Random,
    prompt_tokens: int,
    facts: int,
    kinds: Sequence[str] | None,
) -> Item | None:
    prose, document = filler.draw(rng, prompt_tokens)
    passage = build_passage(rng, tokenizer, prose, draw_facts(rng, facts, kinds), prompt_tokens)
    asked = rng.randrange(facts)
    fact = passage.facts[asked]
    texts = [_asked(tokenizer, ids, fact) for ids in (passage.prompt_ids, passage.deleted_ids)]
    if None in texts:
        return None
    choices, answer = _shuffled(rng, fact.answer, distractors(fact, passage.facts, rng))
    return {
        "context": texts[0],
        "context_deleted": texts[1],
        "choices": choices,
        "answer": answer,
        "kind": fact.kind,
        "distance": _distance(tokenizer, passage, asked),
        "document": document,
    }


def _asked(tokenizer: PreTrainedTokenizerBase, passage_ids: Sequence[int], fact: Fact) -> str | None:
    """Passage and question as text, or None where the text's tokens are not the passage's and then the question's."""
    ids = list(passage_ids)[len(leading_ids(tokenizer)) :]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False) + "\n" + fact.question
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return text if encoded[: len(ids)] == ids else None


def _distance(tokenizer: PreTrainedTokenizerBase, passage: Passage, asked: int) -> int:
    question = tokenizer.encode("\n" + passage.facts[asked].question, add_special_tokens=False)
    return len(passage.prompt_ids) - passage.fact_ends[asked] + len(question)


def distance_bucket(distance: int) -> str:
    """The stretch `distance` lies in: "0-64", "64-128", "128-256" and so on, doubling; the upper bound is excluded."""
    if distance < 0:
        raise ValueError(f"distance is {distance}, must be >= 0")
    low, high = 0, 64
    while distance >= high:
        low, high = high, 2 * high
    return f"{low}-{high}"


def ending_items(stories: Sequence[Story], rng: random.Random) -> list[Item]:
    """One item per story: its first 75 % (to the next sentence end), then which ending follows.

    The right choice is the story's next two sentences (one, if no more are left), the wrong ones those at the same
    place of three other stories. Raises UserError for fewer than four stories.
    """
    _require_four(stories)
    cuts = [_cut_story(story) for story in stories]
    items = []
    for number, (context, rest) in enumerate(cuts):
        others = rng.sample([other for i, (_, other) in enumerate(cuts) if i != number], 3)
        choices, answer = _shuffled(rng, rest, others)
        items.append(_item("ending", number, context, choices, answer, number))
    return items


def _cut_story(story: Story) -> tuple[str, str]:
    """The story up to the first sentence end at or after 75 % of its characters; a space and the next two sentences."""
    sentences = sentences_of(story.text)
    if len(sentences) < 2:
        raise UserError(f"story {story.title!r} is one sentence; an ending needs at least two")
    reached = list(accumulate(map(len, sentences)))
    cut = min(bisect_left(reached, 0.75 * reached[-1]) + 1, len(sentences) - 1)
    return " ".join(sentences[:cut]), " " + " ".join(sentences[cut : cut + 2])


def name_items(stories: Sequence[Story], rng: random.Random, per_story: int | None = None) -> list[Item]:
    """Who is meant: for every name in a story's last third that stood there before, the text up to it and four names.

    `per_story`: at most so many of a story, drawn at random; all of them by default.
    The wrong names are the story's own first, then other stories'. See `names.names_of` for what counts as a name.
    Raises UserError for fewer than four stories.
    """
    _require_four(stories)
    texts = [" ".join(sentences_of(story.text)) for story in stories]
    names = [names_of(text) for text in texts]
    everyone = sorted(set().union(*names))
    items: list[Item] = []
    for document, (text, own) in enumerate(zip(texts, names, strict=True)):
        blanks = list(_blanks(text, own))
        for context, name in blanks if per_story is None else rng.sample(blanks, min(per_story, len(blanks))):
            near = [other for other in own if other != name]
            far = [other for other in everyone if other not in own]
            wrong = (rng.sample(near, len(near)) + rng.sample(far, min(3, len(far))))[:3]
            choices, answer = _shuffled(rng, f" {name}", [f" {other}" for other in wrong])
            items.append(_item("name", len(items), context, choices, answer, document))
    return items


def _blanks(text: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(text before, name) for every name after two thirds of the text that follows a space and occurred before."""
    for name in names:
        for match in re.finditer(rf" {name}\b", text):
            if match.start() >= len(text) * 2 / 3 and re.search(rf"\b{name}\b", text[: match.start()]):
                yield text[: match.start()], name


def _require_four(stories: Sequence[Story]) -> None:
    if len(stories) < 4:
        raise UserError(f"{len(stories)} stories are too few for four choices; at least 4 are needed")


def _item(kind: str, number: int, context: str, choices: list[str], answer: int, document: int) -> Item:
    item = {"id": f"{kind}-{number}", "context": context, "choices": choices, "answer": answer}
    return {**item, "kind": kind, "document": document}


def _shuffled(rng: random.Random, gold: str, wrong: Sequence[str]) -> tuple[list[str], int]:
    choices = rng.sample([gold, *wrong], 1 + len(wrong))
    return choices, choices.index(gold)
