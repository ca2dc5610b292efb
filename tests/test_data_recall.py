"""Facts and passages: exact lengths, facts present and deleted, answers nowhere else."""

import random
from collections import Counter

import pytest

from ftp_lightning.data.filler import Filler
from ftp_lightning.data.recall import Fact, build_passage, distractors, draw_facts
from ftp_lightning.data.sources import load_documents
from ftp_lightning.data.words import FORMS, KINDS
from ftp_lightning.errors import UserError
from ftp_lightning.models import load_tokenizer

TOKENIZER = load_tokenizer("embedded")
STORIES = load_documents("embedded", "calibration")


def encode(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def passage_of(seed, facts=5, prompt_tokens=192, tail_tokens=0):
    rng = random.Random(seed)
    prose, _ = Filler(TOKENIZER, STORIES).draw(rng, prompt_tokens)
    return build_passage(rng, TOKENIZER, prose, draw_facts(rng, facts), prompt_tokens, tail_tokens)


def test_forms_are_those_the_model_was_trained_on():
    words = {"name": "Ann", "thing": "key", "answer": "barn"}
    asked = {kind: f"{f.sentence.format(**words)} {f.question.format(**words)}" for kind, f in FORMS.items()}
    assert asked == {
        "place": "Ann kept the key in the barn. Where did Ann keep the key? In the",
        "trade": "Ann was a barn by trade. What was Ann by trade? A",
        "town": "Ann had come from barn. From what town had Ann come? From",
        "colour": "Ann bought a barn key. What colour was the key that Ann bought? It was",
        "called": "Ann called the key barn. What did Ann call the key? The name was",
    }


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 10, 15])
def test_facts_can_be_confused_but_not_mistaken(count):
    for seed in range(30):
        facts = draw_facts(random.Random(seed), count)
        kinds = Counter(fact.kind for fact in facts)
        assert len(facts) == count and (count == 1 or min(kinds.values()) >= 2)
        assert len({fact.key for fact in facts}) == count
        assert len({(fact.kind, fact.answer) for fact in facts}) == count
        assert len({fact.question for fact in facts}) == count
        for fact in facts:
            answer = fact.answer.strip(" .")
            assert answer in fact.sentence and answer not in fact.question.replace("?", "").split()


def test_draw_facts_by_kind_and_seed():
    assert draw_facts(random.Random(3), 6) == draw_facts(random.Random(3), 6)
    assert {fact.kind for fact in draw_facts(random.Random(0), 4, kinds=["town", "called"])} == {"town", "called"}
    for count, kinds in ((0, None), (2, ["smell"]), (16, ["colour"])):
        with pytest.raises(ValueError, match="facts"):
            draw_facts(random.Random(0), count, kinds)


def test_distractors_come_from_the_passage_first():
    facts = [Fact("place", "", "", f" {word}.", ("place", word)) for word in ("barn", "cellar", "attic")]
    wrong = distractors(facts[0], facts, random.Random(0))
    assert set(wrong[:2]) == {" cellar.", " attic."}
    assert len(set(wrong)) == 3 and " barn." not in wrong
    assert all(answer.strip(" .") in FORMS["place"].answers for answer in wrong)


@pytest.mark.parametrize("prompt_tokens", [96, 192, 400])
def test_passages_have_exactly_their_length(prompt_tokens):
    for seed in range(25):
        passage = passage_of(seed, facts=4, prompt_tokens=prompt_tokens)
        assert len(passage.prompt_ids) == len(passage.deleted_ids) == prompt_tokens
        assert passage.prompt_ids[0] == passage.deleted_ids[0] == TOKENIZER.bos_token_id
        assert TOKENIZER.bos_token_id not in passage.prompt_ids[1:]


def test_facts_are_there_and_deleted():
    for seed in range(25):
        passage = passage_of(seed)
        text, deleted = (TOKENIZER.decode(ids) for ids in (passage.prompt_ids, passage.deleted_ids))
        for fact in passage.facts:
            assert text.count(fact.sentence) == 1 and fact.sentence not in deleted
        prose = text
        for fact in passage.facts:
            prose = prose.replace(" " + fact.sentence, "")
        assert deleted.endswith(prose.removeprefix("<s>"))


def test_fact_ends_point_right_behind_each_fact():
    for seed in range(25):
        passage = passage_of(seed)
        assert passage.fact_ends == sorted(passage.fact_ends)
        for fact, end in zip(passage.facts, passage.fact_ends, strict=True):
            assert TOKENIZER.decode(passage.prompt_ids[:end]).endswith(" " + fact.sentence)


def test_tail_is_free_of_facts():
    for seed in range(25):
        assert 192 - max(passage_of(seed, tail_tokens=64).fact_ends) >= 64


def test_passages_follow_their_seed():
    assert passage_of(4) == passage_of(4) != passage_of(5)


def test_what_does_not_fit_is_a_user_error():
    facts = draw_facts(random.Random(0), 6)
    with pytest.raises(UserError, match="needs 191 tokens of filler; this text has"):
        build_passage(random.Random(0), TOKENIZER, "Too short. By far.", facts, 192)
    with pytest.raises(UserError, match="do not fit"):
        build_passage(random.Random(0), TOKENIZER, " ".join(STORIES[:2]), facts, 48)
    with pytest.raises(UserError, match="do not fit"):
        build_passage(random.Random(0), TOKENIZER, " ".join(STORIES[:2]), facts, 192, tail_tokens=190)


def test_filler_runs_on_only_where_a_document_is_short():
    filler = Filler(TOKENIZER, STORIES)
    for seed in range(50):
        text, document = filler.draw(random.Random(seed), 191)
        assert len(encode(text)) >= 191
        assert text in " ".join(STORIES[document].split())
    text, document = filler.draw(random.Random(0), 1500)
    assert text.startswith(" ".join(STORIES[document].split()))
    with pytest.raises(UserError, match="1000000 are needed"):
        filler.draw(random.Random(0), 1_000_000)
    with pytest.raises(UserError, match="no sentences"):
        Filler(TOKENIZER, ["", " "])


def test_every_kind_is_drawn():
    assert {fact.kind for seed in range(20) for fact in draw_facts(random.Random(seed), 4)} == set(KINDS)
