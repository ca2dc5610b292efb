"""Tables in three formats, paired tests, intervals, and long-context questions: exact truths on small data."""

import csv
import io
import random

import pytest

from ftp_lightning.data.long_tasks import MAKERS, REPHRASED, long_items
from ftp_lightning.data.sources import load_documents
from ftp_lightning.data.task_names import LONG
from ftp_lightning.data.words import KINDS
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation import pairing, quoted, statistics
from ftp_lightning.evaluation.tables import Table, latex_text, percent, text, with_error, with_interval, written
from ftp_lightning.models import load_tokenizer

TOKENIZER = load_tokenizer("embedded")
STORIES = load_documents("embedded", "calibration")


def row(task, i, a, b, document=None):
    score = {"A": None if a is None else float(a), "B": None if b is None else float(b)}
    return {"task": task, "id": f"{i}", "hash": f"h{i}", "document": document, "score": score, "right": score}


def test_pairs_count_what_was_lost_and_gained():
    rows = [row("t", i, a, b) for i, (a, b) in enumerate([(0, 1), (0, 1), (1, 0), (1, 1), (0, 0)])]
    (pair,) = pairing.compare([*rows, row("other", 0, None, 1)], "A", "B")
    assert (pair.task, pair.items, pair.lost, pair.gained) == ("t", 5, 2, 1)
    assert pair.difference == pytest.approx(-0.2) and pair.low < -0.2 < pair.high and pair.p == 1.0
    (alone,) = pairing.compare([row("t", i, 1, 0, "one story") for i in range(3)], "A", "B")
    assert (alone.difference, alone.low, alone.high) == (1.0, None, None)  # one document shows no spread


def test_runs_are_joined_by_what_was_asked(tmp_path):
    first = [row("t", i, 1, None) for i in (0, 1, 1, 2)]
    second = [row("t", i, 0, None) for i in (2, 1, 7)]
    rows, alone = pairing.joined(first, second, "A", "A")
    assert [r["hash"] for r in rows] == ["h1", "h2"] and alone == 3
    assert [r["score"] for r in rows] == [{"A": 1.0, "B": 0.0}] * 2
    with pytest.raises(UserError, match=r"holds no samples.jsonl that can be compared\nMake one with `evaluate`"):
        pairing.read_samples(tmp_path)


def test_interval_of_a_ratio_holds_it_and_says_when_it_is_not_known():
    dense, pruned = [1.0] * 60 + [0.0] * 40, [1.0] * 54 + [0.0] * 46
    low, high = statistics.ratio_interval([(pruned, dense, 0.0)], random.Random(0))
    assert low < 0.9 < high and high <= 1.0 and high - low < 0.2
    assert statistics.ratio_interval([(dense, dense, 0.25)], random.Random(0)) == (1.0, 1.0)
    assert statistics.ratio_interval([(pruned, [1.0, 0.0] * 50, 0.5)], random.Random(0)) is None
    assert statistics.ratio_interval([], random.Random(0)) is None


def test_interval_of_a_score():
    assert statistics.score_interval([1.0, 0.0, 1.0]) == statistics.wilson_interval(2, 3)
    low, high = statistics.score_interval([0.5, 0.7, 0.9])
    assert (low + high) / 2 == pytest.approx(0.7) and statistics.score_interval([0.5]) == (0.0, 1.0)


COLUMNS = {"who": text("who"), "share, %": with_error("share", "error"), "in": with_interval("share", "low", "high")}
RECORDS = [{"who": "a_b | 5%", "share": 0.5, "error": 0.01, "low": 0.4, "high": 0.6, "more": 1.25}, {"who": "none"}]


def test_one_table_in_three_formats():
    table = Table("name", "Title & more", COLUMNS, RECORDS, ("A note.",))
    lines = table.markdown().splitlines()
    assert [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in (lines[2], *lines[4:6])] == [
        ["who", "share, %", "in"],
        ["a_b \\| 5%", "50.0 ± 1.0", "50.0 [40.0, 60.0]"],
        ["none", "–", "–"],
    ]
    first, second = csv.DictReader(io.StringIO(table.csv()))
    assert (first["who"], float(first["more"]), second["share"]) == ("a_b | 5%", 1.25, "")
    latex = table.latex()
    assert r"a\_b | 5\% & 50.0 $\pm$ 1.0 & 50.0 [40.0, 60.0] \\" in latex and r"\caption{Title \& more}" in latex
    assert latex.count(r"\begin{") == latex.count(r"\end{") == 2
    files = written([table, Table("empty", "Nothing", COLUMNS, [])])
    assert set(files) == {"tables.md", "tables.tex", "name.csv"}


def test_latex_escapes_every_special_character_once():
    assert latex_text("\\&%$#_{}~^±–<>") == (
        r"\textbackslash{}\&\%\$\#\_\{\}\textasciitilde{}\textasciicircum{}$\pm$--$<$$>$"
    )
    assert percent("x")({}) == "–" and percent("x")({"x": 0.123}) == "12.3"


def test_quoted_rows_are_marked_and_shares():
    rows = [*quoted.MAIN, *quoted.BY_SPARSITY, *quoted.ROUTERS, *quoted.ALLOCATION, *quoted.FACTORS, *quoted.SPEED]
    assert {r["source"] for r in rows} == {"quoted"} and all(0 < r["sparsity"] < 1 for r in rows)


# ---------------------------------------------------------------- long-context questions


@pytest.mark.parametrize("task", LONG)
@pytest.mark.parametrize("tokens", [128, 400])
def test_long_questions_hold_their_fact_once_and_lose_it_when_deleted(task, tokens):
    items = long_items(task, TOKENIZER, STORIES, random.Random(1), 6, tokens)
    assert items == long_items(task, TOKENIZER, STORIES, random.Random(1), 6, tokens)
    assert [item["id"] for item in items] == [f"{task}-{i}" for i in range(6)]
    for item in items:
        answer = item["choices"][item["answer"]]
        assert len(set(item["choices"])) == 4 and answer.endswith(".") and answer.startswith(" ")
        length = len(TOKENIZER.encode(item["context"], add_special_tokens=False))
        assert 0.8 * tokens < length < tokens + 60 and 0 < item["distance"] < length
        assert item["context"] != item["context_deleted"]
        assert item["context"].split("\n")[-1] == item["context_deleted"].split("\n")[-1]
        assert answer.strip(" .") in item["context"]


def test_where_the_question_stands():
    first, both = (
        long_items(task, TOKENIZER, STORIES, random.Random(2), 1, 160)[0]["context"].split("\n")
        for task in ("question_first", "question_both")
    )
    assert first[0].endswith("?") and first[-1] in ("In the", "A", "From", "It was", "The name was")
    assert both[-1].startswith(both[0]) and both[-1].endswith(first[-1])


def test_many_keys_are_of_one_kind_and_documents_are_numbered():
    item = long_items("multi_key_recall", TOKENIZER, STORIES, random.Random(3), 1, 400)[0]
    held = sum(choice.strip(" .") in item["context"] for choice in item["choices"])
    assert held == 4  # every wrong answer is another key's
    document = long_items("document_qa", TOKENIZER, STORIES, random.Random(3), 1, 400)[0]["context"]
    assert [f"Document {n}." in document for n in range(1, 6)] == [True] * 4 + [False]


def test_other_words_are_there_for_every_kind():
    assert set(REPHRASED) == set(KINDS) and set(MAKERS) == set(LONG)
