"""Prompts of kinds that nothing was tuned on: few-shot questions, choices, stories, code."""

import ast
import importlib
import inspect
import json

import pytest

from ftp_lightning import UserError
from ftp_lightning.studies.other_prompts import EXAMPLES, KINDS, other_prompts
from ftp_lightning.studies.record_questions import Asked, Sources, record_questions


@pytest.fixture
def folder(tmp_path):
    choices = {"text": ["red", "blue"], "label": ["1", "2"]}
    for part in ("train", "test"):
        asked = [{"question": f"{part} {n}?", "choices": choices, "answerKey": "2"} for n in range(5)]
        (tmp_path / f"arc_easy_{part}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    choice = {"question": "Which?", "choices": ["p", "q", "r", "s"], "answer": 1}
    (tmp_path / "mmlu_test.jsonl").write_text(json.dumps(choice))
    (tmp_path / "hellaswag_validation.jsonl").write_text(json.dumps({"ctx": "A man sits. he"}))
    return tmp_path


def test_examples_are_answered_and_the_question_is_not(folder):
    for _, prompt in other_prompts("few-shot", str(folder), 5):
        *shown, asked = prompt.split("\n\n")
        assert len(shown) == EXAMPLES and all(one.startswith("Question: train") for one in shown)
        assert all(one.endswith("Answer: blue") for one in shown)
        assert asked.startswith("Question: test") and asked.endswith("Answer:")


def test_choices_and_stories_are_said_whole(folder):
    assert other_prompts("choice", str(folder), 9) == [
        ("choice 0", "Which?\nA. p\nB. q\nC. r\nD. s\nWhich one is right, and why?")
    ]
    assert other_prompts("story", str(folder), 9) == [("story 0", "Go on with this text:\n\nA man sits. he")]


def test_code_is_one_whole_function(folder):
    found = other_prompts("code", "", 30)
    assert len({prompt for _, prompt in found}) == 30
    for document, prompt in found:
        (function,) = ast.parse(prompt.split("\n\n", 1)[1]).body
        assert isinstance(function, ast.FunctionDef)
        module = importlib.import_module(document.removeprefix("code "))
        assert f"def {function.name}(" in inspect.getsource(module)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_prompts_do_not_depend_on_how_many_are_asked(folder, kind):
    assert other_prompts(kind, str(folder), 1) == other_prompts(kind, str(folder), 3)[:1]


@pytest.mark.parametrize("kind", ["few-shot", "choice", "story"])
def test_a_missing_file_is_told(tmp_path, kind):
    with pytest.raises(UserError, match="is not a file"):
        other_prompts(kind, str(tmp_path), 1)


def test_the_record_asks_them(folder):
    from ftp_lightning.models import load

    tokenizer = load("embedded")[1]
    asked = Asked((("choice", 2), ("code", 3)), chat=False)
    (one,) = record_questions(tokenizer, asked, Sources("", "", str(folder)), "test", "choice")
    assert not one.gold and one.document == "choice 0" and "Which one is right" in tokenizer.decode(one.ids)
    code = record_questions(tokenizer, asked, Sources("", ""), "test", "code")
    assert record_questions(tokenizer, asked, Sources("", ""), "test", "code", 2, 5) == code[2:] and len(code) == 3
