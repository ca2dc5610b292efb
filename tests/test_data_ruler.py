"""RULER's tasks, reading comprehension and last words: wording, length, and twins without what holds the answer."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import lm_eval.tasks
import numpy
import pytest

from ftp_lightning.data import needles
from ftp_lightning.data.prompt_length import PromptLength
from ftp_lightning.data.reading import read_questions
from ftp_lightning.data.task_names import GENERATED, LAST_WORD, NIAH, RULER
from ftp_lightning.errors import UserError
from ftp_lightning.models import load_tokenizer
from ftp_lightning.stages.task_files import MAKERS, made_rows

TOKENIZER = load_tokenizer("embedded")
LENGTH = 700
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if not loop.last %}|{% endif %}{% endfor %}"


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Twelve articles of two passages each, with one question per passage."""
    path = tmp_path_factory.mktemp("records") / "squad.jsonl"
    rows = [
        {
            "id": f"{article}-{part}",
            "article": article,
            "context": f"The harbour of town {article} has house {part}. " * 6
            + f"Its keeper is Keeper{article}x{part}.",
            "question": f"Who is the keeper of house {part} in town {article}?",
            "answers": [f"Keeper{article}x{part}", f"keeper keeper{article}x{part}"],
        }
        for article in range(12)
        for part in range(2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(task, records, count=2, **changes):
    settings = {
        "data": "embedded", "chosen_split": "all", "seed": 0, "prompt_tokens": LENGTH, "items": count,
        "task_data": str(records), "apply_chat_template": False, "model": "embedded",
    }  # fmt: skip
    return made_rows(task, SimpleNamespace(**settings | changes), TOKENIZER)


@pytest.fixture(scope="module")
def made(records):
    return {task: rows(task, records) for task in (*GENERATED, LAST_WORD)}


def test_the_wording_is_lm_evals():
    folder = Path(lm_eval.tasks.__file__).parent / "ruler"
    prepare, niah = ((folder / name).read_text() for name in ("prepare_niah.py", "niah_utils.py"))
    assert needles.TEMPLATE.replace("\n", "\\n") in niah and f'"{needles.NEEDLE}"' in prepare
    one, several = (
        needles.PREFIX.format(type_needle_v=kind, query="{query}", verb=verb)
        for kind, verb in (("{type_needle_v[:-1]}", "is"), ("{type_needle_v}", "are"))
    )
    assert one in prepare and several in prepare
    for several, one in needles.ONE:
        assert f'template.replace("{several}", "{one}")' in prepare
    assert list(needles.DEPTHS) == list(numpy.round(numpy.linspace(0, 100, num=40)).astype(int))


def test_a_single_needle_is_asked_for_in_rulers_words(made):
    item = made["ruler_niah_single"][0]
    [number] = item["outputs"]
    needle = next(line for line in item["context"].split("One of the special magic numbers for ") if number in line)
    key = needle.split(" is: ")[0]
    assert len(number) == 7 and number.isdigit() and needle.startswith(f"{key} is: {number}.")
    assert item["context"].startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about"
        " the number afterwards.\n"
    )
    assert item["context"].endswith(f"\nWhat is the special magic number for {key} mentioned in the provided text?")
    assert item["gen_prefix"] == f"The special magic number for {key} mentioned in the provided text is"


def test_how_many_needles_there_are_and_how_many_are_asked_for(made):
    counts = {
        task: (made[task][0]["context"].count(" magic numbers for "), len(made[task][0]["outputs"])) for task in NIAH
    }
    asked = (0, 0, 1, 1)  # the question itself says "numbers for" where several are asked for
    assert [count - more for (count, _), more in zip(counts.values(), asked)] == [1, 4, 4, 4]
    assert [outputs for _, outputs in counts.values()] == [1, 1, 4, 4]


@pytest.mark.parametrize("task", (*GENERATED, LAST_WORD))
def test_prompts_fill_their_length_and_hold_the_answer_that_the_twin_lacks(made, task):
    for item in made[task]:
        outputs = item.get("outputs", [item.get("target")])
        prefix, delimiter = (
            item.get("gen_prefix", ""),
            "\n\n" if task == "ruler_cwe" else "\n" if "squad" in task else " ",
        )
        counts = [
            len(TOKENIZER.encode(item[field] + (delimiter + prefix if prefix else "")))
            for field in ("context", "context_deleted")
        ]
        assert max(counts) == item["tokens"] <= LENGTH
        if task != "squad":  # which is as long as its passage
            assert item["tokens"] > (0.8 if task == "squad_long" or task in RULER else 0.3) * LENGTH
        for output in outputs[:1] if "squad" in task or task == "ruler_qa" else outputs:
            assert output in item["context"] and output not in item["context_deleted"]
        assert item["distance"] is None or 0 < item["distance"] < counts[0]


@pytest.mark.parametrize("task", (*GENERATED, LAST_WORD))
def test_items_are_drawn_alike_however_many_and_leave_random_alone(made, records, task):
    random.seed(1)
    numpy.random.seed(1)
    assert rows(task, records, count=1) == made[task][:1]
    assert (random.random(), numpy.random.random()) == (0.13436424411240122, 0.417022004702574)
    assert rows(task, records, count=1, seed=1) != made[task][:1]


def test_the_document_is_the_one_the_haystack_starts_in(made):
    from ftp_lightning.data.sources import load_documents

    documents = [" ".join(text.split()) for text in load_documents("embedded", "all")]
    for item in made["ruler_niah_single"]:
        first = item["context_deleted"].split("\n")[1][:80]
        assert first in documents[item["document"]]


def test_a_chat_template_is_counted(records, monkeypatch):
    monkeypatch.setattr(TOKENIZER, "chat_template", CHAT)
    [item] = rows("ruler_niah_single", records, count=1, apply_chat_template=True)
    text = f"<user>{item['context']}|<assistant>{item['gen_prefix']}"
    assert len(TOKENIZER.encode(text, add_special_tokens=False)) <= item["tokens"] <= LENGTH
    [item] = rows("squad", records, count=1, apply_chat_template=True)
    assert item["context"].startswith("Answer the question with words of the text.\n\nThe harbour")
    assert (item["gen_prefix"], item["new_tokens"]) == ("", 32)
    with pytest.raises(UserError, match="has no chat template"):
        monkeypatch.setattr(TOKENIZER, "chat_template", None)
        rows("squad", records, apply_chat_template=True)


def test_answers_are_generated_no_longer_than_they_are(made):
    item = made["ruler_niah_single"][0]
    assert item["new_tokens"] == len(TOKENIZER.encode(" " + item["outputs"][0], add_special_tokens=False)) + 8


def test_too_short_a_prompt_is_told_of(records):
    for task in ("ruler_vt", "ruler_niah_multikey", "squad_long"):
        with pytest.raises(
            UserError, match=rf"{task}: its shortest prompt has \d+ tokens, 40 are allowed\nGive --prompt_tokens \d+: "
        ):
            rows(task, records, prompt_tokens=40)


# ---------------------------------------------------------------- reading


def test_articles_are_split_as_wholes(records):
    parts = {
        split: read_questions([records], split) for split in ("calibration", "training", "validation", "test", "all")
    }
    everyone = parts.pop("all")
    assert sum(map(len, parts.values())) == len(everyone) == 24
    articles = [{question.article for question in part} for part in parts.values()]
    assert len(set.union(*articles)) == sum(map(len, articles)) == 12


def test_distractors_are_of_other_articles_and_the_twin_has_one_more(made):
    for item in made["squad_long"]:
        passages = [field.split("\n\n")[:-1] for field in (item["context"], item["context_deleted"])]
        own = [text for text in passages[0] if f"town {item['document']} " in text]
        assert len(own) == 1 and item["outputs"][0] in own[0]
        assert len(passages[0]) == len(passages[1]) > 2
        assert set(passages[0]) - set(passages[1]) == {own[0]}
    assert made["squad"][0]["context_deleted"] == made["squad"][0]["context"].split("\n\n")[1]


def test_squads_own_schema_is_read(tmp_path):
    row = {"id": "a", "title": "T", "context": "It is red.", "question": "What?", "answers": {"text": ["red", "red"]}}
    (tmp_path / "squad.jsonl").write_text(json.dumps(row))
    [item] = rows("squad", tmp_path)
    assert (item["document"], item["outputs"]) == ("T", ["red"])
    assert item["context"] == "It is red.\n\nQuestion: What?" and item["gen_prefix"] == "Answer:"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answers": []}, "line 1: 'answers' must hold at least one text"),
        ({"answers": [""]}, "line 1: 'answers' must hold at least one text"),
        ({"question": None}, "line 1: a record needs the texts 'context' and 'question'"),
    ],
)
def test_records_that_cannot_be_asked_are_told_of(tmp_path, change, said):
    row = {"id": "a", "article": 1, "context": "It is red.", "question": "What?", "answers": ["red"]}
    (tmp_path / "squad.jsonl").write_text(json.dumps(row | change))
    with pytest.raises(UserError, match=said):
        rows("squad", tmp_path)


def test_missing_records_are_told_of(records, tmp_path):
    with pytest.raises(UserError, match=r"squad asks questions of SQuAD's form(.|\n)*--task_data FILE"):
        MAKERS["squad"](SimpleNamespace(task_data=None, chosen_split="all"), TOKENIZER, 1)
    with pytest.raises(UserError, match="holds no squad.jsonl"):
        rows("ruler_qa", tmp_path)
    (tmp_path / "squad.jsonl").write_text(records.read_text().splitlines()[0])
    with pytest.raises(UserError, match="has no other passage that lacks its answer"):
        rows("squad_long", tmp_path)


# ---------------------------------------------------------------- last words


def test_the_last_word_stood_in_the_passage_before(made):
    for item in made[LAST_WORD]:
        passage, sentence, word = item["context"], item["context_deleted"], item["target"]
        assert passage.endswith(sentence) and len(passage.split()) >= 50 and word in passage.removesuffix(sentence)
        tail = TOKENIZER.decode(TOKENIZER.encode(passage)[-item["distance"] :])
        assert word not in tail.removesuffix(sentence)


def test_a_text_without_such_words_is_told_of(tmp_path):
    (tmp_path / "text.txt").write_text("I am. " * 400)
    with pytest.raises(UserError, match="no sentence of the text ends in a word"):
        rows(LAST_WORD, tmp_path, data=str(tmp_path))


def test_lengths_are_the_largest_that_fit():
    length = PromptLength(TOKENIZER, 11)
    make = lambda size: (" ".join(["a"] * size), "")  # noqa: E731
    best = length.longest("x", make, range(1, 100))
    assert length.count(*make(best)) <= 11 < length.count(*make(best + 1))
