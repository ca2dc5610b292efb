"""Long-context questions at any length: many keys, several documents, the question before the text, other words. [ours]

All are made as `recall_items` are (facts drawn at random and set into prose, so that the answer stands in the prompt
alone), with `context_deleted`, the same text without the facts. `prompt_tokens` is the length of the passage, the
model's window its only bound.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ftp_lightning.data.filler import Filler
from ftp_lightning.data.recall import Fact, Passage, build_passage, distractors, draw_facts, fact_count
from ftp_lightning.data.text import leading_ids
from ftp_lightning.data.words import FORMS, KINDS, NAMES
from ftp_lightning.errors import UserError

Item = dict[str, Any]
_TRIES = 100
_PER_KEY = 24
"""Tokens of passage per key: about one sentence in two states a fact."""
_PER_DOCUMENT = 96

REPHRASED = {
    "place": "In which place did {name} have the {thing}? In the",
    "trade": "How did {name} make a living? As a",
    "town": "Which town was the home of {name}? The town of",
    "colour": "Tell me the colour of the {thing} of {name}. It was",
    "called": "Which name had the {thing} of {name}? It was called",
}
"""Questions in words that the embedded model was not trained on."""


def multi_key(rng: random.Random, tokenizer: PreTrainedTokenizerBase, filler: Filler, tokens: int) -> Item | None:
    """Multi-key recall (after RULER, Hsieh et al. 2024): as many facts of one kind as the passage takes, one asked for.

    The others differ in their words only, and their answers are the wrong choices."""
    kind = rng.choice(KINDS)
    pools = [pool for pool in (NAMES, FORMS[kind].answers, FORMS[kind].things) if len(pool) > 1]
    count = max(2, min(tokens // _PER_KEY, *map(len, pools)))
    passage, document = _passage(rng, tokenizer, filler, draw_facts(rng, count, [kind]), tokens)
    return _asked(rng, tokenizer, passage, document, "{passage}\n{question}")


def document_qa(rng: random.Random, tokenizer: PreTrainedTokenizerBase, filler: Filler, tokens: int) -> Item | None:
    """Several numbered documents, a fact of one kind in each, and a question about one of them."""
    kind = rng.choice(KINDS)
    count = max(2, min(tokens // _PER_DOCUMENT, 8))
    facts = draw_facts(rng, count, [kind])
    heads = [f"Document {number}.\n" for number in range(1, count + 1)]
    room = tokens // count - max(len(_ids(tokenizer, head)) for head in heads) - 2
    made = [_passage(rng, tokenizer, filler, [fact], room) for fact in facts]
    joined = [
        "\n\n".join(head + _text(tokenizer, ids(passage)) for head, (passage, _) in zip(heads, made, strict=True))
        for ids in (lambda p: p.prompt_ids, lambda p: p.deleted_ids)
    ]
    asked = rng.randrange(count)
    fact = facts[asked]
    if joined[0].count(fact.sentence) != 1 or fact.sentence in joined[1]:
        return None
    return _item(rng, tokenizer, joined, facts, fact, made[asked][1], "{passage}\n{question}", fact.question)


def question_first(rng: random.Random, tokenizer: PreTrainedTokenizerBase, filler: Filler, tokens: int) -> Item | None:
    """The question stands before the passage; after it only the first words of the answer."""
    return _placed(rng, tokenizer, filler, tokens, "{asked}\n{passage}\n{cue}")


def question_both(rng: random.Random, tokenizer: PreTrainedTokenizerBase, filler: Filler, tokens: int) -> Item | None:
    """The question stands before the passage and after it."""
    return _placed(rng, tokenizer, filler, tokens, "{asked}\n{passage}\n{question}")


def rephrased(rng: random.Random, tokenizer: PreTrainedTokenizerBase, filler: Filler, tokens: int) -> Item | None:
    """Facts as always, asked for in words that were never trained on."""
    facts = draw_facts(rng, fact_count(rng, tokens))
    passage, document = _passage(rng, tokenizer, filler, facts, tokens)
    return _asked(rng, tokenizer, passage, document, "{passage}\n{question}", REPHRASED)


MAKERS: dict[str, Callable[..., Item | None]] = {
    "multi_key_recall": multi_key,
    "document_qa": document_qa,
    "question_first": question_first,
    "question_both": question_both,
    "rephrased_recall": rephrased,
}


def long_items(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    rng: random.Random,
    count: int,
    prompt_tokens: int,
) -> list[Item]:
    """`count` items of a task of `MAKERS`, each on a passage of `prompt_tokens` tokens (BOS included).

    Fields as in `choices.recall_items`. UserError for passages too short for their facts, or a tokenizer that does not
    give a passage's text back.
    """
    filler, items = Filler(tokenizer, documents), []
    for number in range(count):
        made = (MAKERS[task](rng, tokenizer, filler, prompt_tokens) for _ in range(_TRIES))
        item = next((item for item in made if item is not None), None)
        if item is None:
            raise UserError(f"{task}: this tokenizer does not give back the text of a decoded passage")
        items.append({"id": f"{task}-{number}", **item})
    return items


def _placed(rng: random.Random, tokenizer: Any, filler: Filler, tokens: int, layout: str) -> Item | None:
    passage, document = _passage(rng, tokenizer, filler, draw_facts(rng, fact_count(rng, tokens)), tokens)
    return _asked(rng, tokenizer, passage, document, layout)


def _passage(
    rng: random.Random, tokenizer: Any, filler: Filler, facts: Sequence[Fact], tokens: int
) -> tuple[Passage, int]:
    prose, document = filler.draw(rng, tokens)
    return build_passage(rng, tokenizer, prose, facts, tokens), document


def _asked(
    rng: random.Random,
    tokenizer: Any,
    passage: Passage,
    document: int,
    layout: str,
    forms: dict[str, str] | None = None,
) -> Item | None:
    """The passage with a question about one of its facts; None where its sentence is not in the text just once."""
    fact = rng.choice(passage.facts)
    texts = [_text(tokenizer, ids) for ids in (passage.prompt_ids, passage.deleted_ids)]
    if texts[0].count(fact.sentence) != 1 or fact.sentence in texts[1]:
        return None
    question = fact.question if forms is None else forms[fact.kind].format(**_words(fact))
    return _item(rng, tokenizer, texts, passage.facts, fact, document, layout, question)


def _item(
    rng: random.Random,
    tokenizer: Any,
    texts: Sequence[str],
    facts: Sequence[Fact],
    fact: Fact,
    document: int,
    layout: str,
    question: str,
) -> Item:
    asked, cue = _matched(r"(.*?[?.]) (.*)", question).groups()
    whole, deleted = (layout.format(passage=text, question=question, asked=asked, cue=cue) for text in texts)
    choices = rng.sample(wrong := [fact.answer, *distractors(fact, facts, rng)], len(wrong))
    after = whole[whole.index(fact.sentence) + len(fact.sentence) :]
    return {
        "context": whole,
        "context_deleted": deleted,
        "choices": choices,
        "answer": choices.index(fact.answer),
        "kind": fact.kind,
        "distance": len(_ids(tokenizer, after)),
        "document": document,
    }


def _words(fact: Fact) -> dict[str, str]:
    """What the fact's sentence was filled with."""
    pattern = re.escape(FORMS[fact.kind].sentence)
    for name in ("name", "thing", "answer"):
        pattern = pattern.replace(re.escape("{" + name + "}"), f"(?P<{name}>.+)", 1)
    return _matched(pattern, fact.sentence).groupdict()


def _matched(pattern: str, text: str) -> re.Match:
    """Of a text that is made to match."""
    found = re.fullmatch(pattern, text)
    assert found is not None, (pattern, text)
    return found


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    ids = list(ids)[len(leading_ids(tokenizer)) :]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)
