"""Multiple-choice items: the text round-trips, the answer is the right one, the context holds what it must."""

import json
import random

import pytest

from ftp_lightning.data.choices import distance_bucket, ending_items, name_items, recall_items
from ftp_lightning.data.names import names_of
from ftp_lightning.data.sources import load_documents
from ftp_lightning.data.stories import Story, load_stories
from ftp_lightning.errors import UserError
from ftp_lightning.models import load_tokenizer

TOKENIZER = load_tokenizer("embedded")
DOCUMENTS = load_documents("embedded", "test")
STORIES = load_stories("test")


def recall(count=25, seed=0, **options):
    return recall_items(TOKENIZER, DOCUMENTS, random.Random(seed), count, **options)


def test_recall_contexts_tokenise_to_the_passage_and_its_question():
    for item in recall():
        for field in ("context", "context_deleted"):
            passage, question = item[field].rsplit("\n", 1)
            ids = TOKENIZER.encode(passage)
            assert len(ids) == 192
            assert TOKENIZER.encode(item[field]) == ids + TOKENIZER.encode("\n" + question, add_special_tokens=False)
            for choice in item["choices"]:
                answer = TOKENIZER.encode(choice, add_special_tokens=False)
                assert TOKENIZER.encode(item[field] + choice) == TOKENIZER.encode(item[field]) + answer


def test_recall_answers_stand_in_the_fact_and_nowhere_in_the_deleted_context():
    for item in recall():
        gold = item["choices"][item["answer"]]
        passage, question = item["context"].rsplit("\n", 1)
        at = TOKENIZER.encode(item["context"], add_special_tokens=False)[: -item["distance"]]
        fact = TOKENIZER.decode(at).rsplit(". ", 1)[1]
        name = next(word for word in question.replace("?", "").split()[2:] if word.istitle())
        assert gold.strip(" .") in fact and name in fact and fact in passage
        assert fact not in item["context_deleted"]
        assert item["context_deleted"].rsplit("\n", 1)[1] == question
        assert len(set(item["choices"])) == 4 and all(choice.startswith(" ") for choice in item["choices"])
        near = sum(choice.strip(" .") in passage for choice in item["choices"])
        assert near >= 2


def test_recall_items_are_plain_deterministic_and_shuffled():
    items = recall(40)
    assert items == recall(40) != recall(40, seed=1)
    assert json.loads(json.dumps(items)) == items
    assert {item["answer"] for item in items} == {0, 1, 2, 3}
    assert len({item["id"] for item in items}) == 40
    assert set(items[0]) == {
        "id", "context", "context_deleted", "choices", "answer", "kind", "distance", "document",
    }  # fmt: skip


def test_short_passages_take_fewer_facts():
    for item in recall(10, prompt_tokens=64):
        facts = item["context"].rsplit("\n", 1)[0]
        assert len(TOKENIZER.encode(facts)) == 64
    assert recall(10, prompt_tokens=64) == recall(10, prompt_tokens=64)


def test_recall_needs_a_faithful_tokenizer():
    class Forgetful:
        bos_token_id = None
        encode = staticmethod(lambda text, **_: TOKENIZER.encode(text, add_special_tokens=False))
        decode = staticmethod(lambda ids, **_: "something else")

    with pytest.raises(UserError, match="does not give back"):
        recall_items(Forgetful(), DOCUMENTS, random.Random(0), 1)


@pytest.mark.parametrize(
    ("distance", "bucket"),
    [(0, "0-64"), (63, "0-64"), (64, "64-128"), (127, "64-128"), (128, "128-256"), (1000, "512-1024")],
)
def test_distance_buckets(distance, bucket):
    assert distance_bucket(distance) == bucket


def test_distance_must_not_be_negative():
    with pytest.raises(ValueError, match="-1"):
        distance_bucket(-1)


def test_endings_continue_their_own_story():
    items = ending_items(STORIES, random.Random(0))
    assert len(items) == len(STORIES)
    for item, story in zip(items, STORIES, strict=True):
        text = " ".join(story.text.split())
        assert text.startswith(item["context"] + item["choices"][item["answer"]])
        assert 0.6 < len(item["context"]) / len(text) < 1
        wrong = [choice for i, choice in enumerate(item["choices"]) if i != item["answer"]]
        assert not any(choice in text for choice in wrong) and len(set(item["choices"])) == 4


def test_names_were_mentioned_before_and_follow():
    items = name_items(STORIES, random.Random(0))
    assert len(items) > len(STORIES)
    for item in items:
        text = " ".join(STORIES[item["document"]].text.split())
        gold = item["choices"][item["answer"]]
        assert text.startswith(item["context"] + gold) and gold.strip() in item["context"]
        assert len(item["context"]) >= len(text) * 2 / 3 - 1
        assert len(set(item["choices"])) == 4


def test_names_rule():
    text = (
        "The king saw Ann and Bob Hill. In May, Ann went to the Mill with Bob. Then Ann left; Bob stayed at the Mill. "
        "She saw Clover, who ate clover, and Clover slept."
    )
    assert names_of(text) == ["Ann", "Bob"]


def test_four_stories_are_needed():
    for task in (ending_items, name_items):
        with pytest.raises(UserError, match="at least 4"):
            task(STORIES[:3], random.Random(0))
    with pytest.raises(UserError, match="one sentence"):
        ending_items([Story(f"S{i}", ("Only one.",)) for i in range(4)], random.Random(0))


def test_facts_of_given_kinds_alone():
    items = recall(12, kinds=("colour", "called"))
    assert {item["kind"] for item in items} == {"colour", "called"}
    for words in (" kept the ", " by trade", " had come from "):
        assert not any(words in item["context"] for item in items)
