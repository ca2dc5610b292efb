"""The record on real models: pruners replayed from the dense model's states, its questions, its tables."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tiny import random_llama

from ftp_lightning import Schedule, StaticRouter, TokenPruner, UntrainedRouter, UserError
from ftp_lightning.attention_score import AttentionScore
from ftp_lightning.costs.request import planned_cut
from ftp_lightning.data.rows import Row, Rows
from ftp_lightning.evaluation.continuation import evaluate_rows
from ftp_lightning.evaluation.replayed import Question, answered, line_ends, replayed
from ftp_lightning.models import load
from ftp_lightning.studies.record_questions import Asked, Sources, record_questions
from ftp_lightning.studies.record_study import Recorded, RecordStudy, blocks_of
from ftp_lightning.studies.record_times import RecordTimes, Timed

ROOT = Path(__file__).parents[1]
PROMPT = tuple(range(3, 30))


class Letters:
    """Token 3 is "a", token 4 "b", and so on; 2 ends a line."""

    def get_vocab(self):
        return {"\n" if token == 2 else chr(94 + token): token for token in range(30)}

    def decode(self, tokens, skip_special_tokens=False):
        return "".join("\n" if token == 2 else chr(94 + token) for token in tokens)


@pytest.fixture(scope="module")
def model():
    return random_llama(30, num_hidden_layers=4, initializer_range=0.3).requires_grad_(False)


@pytest.mark.parametrize(
    "pruner",
    [
        TokenPruner(StaticRouter(), Schedule([0.0, 0.0, 0.5, 1.0], kv="keep")),
        TokenPruner(StaticRouter(), Schedule([0.4, 0.0, 0.5, 1.0], kv="evict")),
        TokenPruner(UntrainedRouter(("rank",)), Schedule([0.0, 0.0, 0.6, 0.6]), attention=AttentionScore(window=4)),
    ],
    ids=["keep", "evict", "attention"],
)
def test_a_replay_gives_what_a_whole_forward_gives(model, pruner):
    dense = answered(model, Letters(), Question(PROMPT, "book", 6))
    rows = Rows([Row(list(PROMPT), list(dense.answer), document="book")])
    (whole,) = evaluate_rows(model, rows, pruner).items()
    found = replayed(model, Letters(), dense, pruner)
    assert found["kl"] == pytest.approx(whole["kl"], rel=1e-4, abs=1e-7) and found["kl"] > 0
    for name in ("agreed", "first", "flops", "dense_flops", "sparsity"):
        assert found[name] == pytest.approx(whole[name]), name


def test_an_answer_is_kept_by_its_first_line_where_it_has_a_gold_one(model):
    plain = answered(model, Letters(), Question(PROMPT, "book", 6))
    said = Letters().decode(plain.answer)
    pruner = TokenPruner(StaticRouter(), Schedule([0.0, 1.0, 1.0, 1.0], kv="evict"))
    other = replayed(model, Letters(), plain, pruner)
    assert not other["agreed"] and not other["right"] and other["needed"]  # word for word, without a gold answer
    with pruner(model):
        pruned = Letters().decode(answered_by(model, PROMPT, 6))
    assert line_ends(Letters()) == {2} and line_ends(load("embedded")[1])
    for gold in (said[0], said, pruned):
        dense = answered(model, Letters(), Question(PROMPT, "book", 6, (gold,)))
        assert dense.right == (gold.lower() in said.split("\n")[0].lower())
        if dense.right:
            assert replayed(model, Letters(), dense, pruner)["right"] == (gold.lower() in pruned.split("\n")[0].lower())
    known = answered(model, Letters(), Question(PROMPT, "book", 6, (said[0],), PROMPT))
    assert known.right and not known.needed  # the same answer without the passage
    wrong = answered(model, Letters(), Question(PROMPT, "book", 6, ("not this",)))
    assert not wrong.right and not replayed(model, Letters(), wrong, pruner)["right"]


def answered_by(model, ids, new):
    return model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("record")
    for split in ("calibration", "test"):
        (folder / split).mkdir()
        text = (ROOT / "ftp_lightning" / "assets" / "stories" / f"{split}.txt").read_text()
        (folder / split / "stories.txt").write_text(text)
    rows = [
        {
            "article": a,
            "context": f"The river {a} is {n} miles long.",
            "question": f"How long, {n}?",
            "answers": [str(n)],
        }
        for a in "abcdefgh"
        for n in range(4)
    ]
    (folder / "squad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Sources(str(folder), str(folder / "squad.jsonl"))


ASKED = Asked((("needles-150-180", 2), ("xquad", 3), ("own", 2), ("prose", 2)), keys=2, chat=False)


def test_questions_follow_from_the_split_alone(sources):
    _, tokenizer = load("embedded")
    found = {task: record_questions(tokenizer, ASKED, sources, "test", task) for task, _ in ASKED.counts}
    assert {task: len(questions) for task, questions in found.items()} == dict(ASKED.counts)
    for question in found["needles-150-180"]:
        text = tokenizer.decode(question.ids)
        assert text.count("One of the special magic numbers") == 2 and question.gold[0] in text
        assert len(question.ids) <= 180
    assert not {one.ids for one in found["xquad"]} & {one.ids for one in found["own"]}
    assert all(one.gold and len(one.alone) < len(one.ids) for one in found["xquad"])
    assert not any(one.gold for one in found["own"] + found["prose"])
    for task, questions in found.items():
        assert record_questions(tokenizer, ASKED, sources, "test", task, 1, 1) == questions[1:2], task
    again = {task: record_questions(tokenizer, ASKED, sources, "test", task) for task, _ in ASKED.counts}
    assert again == found
    with pytest.raises(UserError, match="there is no book"):
        record_questions(tokenizer, ASKED, sources, "validation", "prose")


def test_a_cell_is_one_method_on_one_chunk(sources):
    study = RecordStudy((("embedded", ASKED),), sources, items=2, fit_items=1)
    for method in ("8-11", "8-11 fitted 4", "embedded at 0.1", "deletion_recent to 0.2", "gem_filter to 0.2"):
        found = study.measure(Recorded("embedded", "test", "xquad", 1, method))
        assert found["item"].tolist() == [2] and set(found["method"]) == {method}
        assert found["flops"].lt(found["dense_flops"]).all()


def test_a_small_cut_has_maps_of_its_own_and_can_do_without_them(sources):
    study, name = RecordStudy((), sources), "smollm2-135m-instruct"
    own, shared, large = (study.pruner(name, f"{name}{more}") for more in (" at 0.13", " shared at 0.13", " at 0.4"))
    assert own.scheduled == shared.scheduled
    assert shared.maps.digest() == large.maps.digest() != own.maps.digest()


@pytest.mark.parametrize("method", ["8-11", "gem_filter to 0.2"])
def test_a_time_stands_beside_what_the_flops_allow(monkeypatch, sources, method):
    monkeypatch.setattr("ftp_lightning.studies.record_times.PAIRS", 2)
    study = RecordStudy((("embedded", ASKED),), sources)
    (row,) = RecordTimes(study).measure(Timed("embedded", 200, method)).to_dict("records")
    assert row["pairs"] == 2 and row["low"] <= row["speedup"] <= row["high"] and row["pruned_ms"] > 0
    model, pruner = study.loaded("embedded")[0], study.pruner("embedded", method)
    assert row["flops_limit"] > 1 / (1 - planned_cut(model, pruner, 200))  # and the last block runs on one token
    assert row["flops_limit"] < 1.1 / (1 - planned_cut(model, pruner, 200))


@pytest.mark.parametrize("method", ["nothing to 0.2", "block_influence to 0.2"])
def test_methods_of_the_registry_that_cannot_be_placed_are_told(sources, method):
    with pytest.raises(UserError, match=r"there is no method 'nothing'|block_influence needs `influence`"):
        RecordStudy((), sources).pruner("embedded", method)


@pytest.mark.parametrize("name", ["late", "3-", "9-12", ""])
def test_methods_that_are_none_are_told(name):
    with pytest.raises(UserError, match="method"):
        blocks_of(name, 12)


def test_blocks_are_named_one_by_one_or_by_their_ends():
    assert blocks_of("2,4-6,11", 12) == [2, 4, 5, 6, 11]


def test_the_page_shows_the_measured_times(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["record_times.py", "--tables", "--output", str(tmp_path)])
    runpy.run_path("experiments/record_times.py", run_name="__main__")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| smollm2")]
    assert len(rows) >= 3 and [row for row in rows if row not in (ROOT / "docs" / "record.md").read_text()] == []


def test_the_figure_is_drawn_from_stored_rows(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("pareto", ROOT / "docs" / "pareto.py")
    pareto = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pareto)
    monkeypatch.setattr(pareto, "PICTURE", tmp_path / "pareto.png")
    pareto.main()
    assert (tmp_path / "pareto.png").stat().st_size > 10_000


GEMMA = ("--model", "gemma3-270m", "--split", "validation")
OTHER = ("--tasks", "few-shot,choice,story,code")


@pytest.mark.parametrize(("words", "methods"), [((), 7), (GEMMA, 3), (OTHER, 7)])
def test_the_page_shows_what_the_stored_rows_say(monkeypatch, capsys, tmp_path, words, methods):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["record.py", "--tables", "--output", str(tmp_path), *words])
    runpy.run_path("experiments/record.py", run_name="__main__")
    page = (ROOT / "docs" / "record.md").read_text()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) > methods + 2  # and two heads, and differences
    assert [row for row in rows if row not in page] == []
