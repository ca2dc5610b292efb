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
from ftp_lightning.evaluation.harness.results import summaries, summarize
from ftp_lightning.evaluation.record import difference, joined, record
from ftp_lightning.evaluation.tables import Table, latex_text, percent, text, with_error, with_interval, written
from ftp_lightning.models import load_tokenizer

TOKENIZER = load_tokenizer("embedded")
STORIES = load_documents("embedded", "calibration")


def items(method, scores, task="t", **labels):
    rows = [{"score": score, "right": bool(score), "hash": f"h{n}", **labels} for n, score in enumerate(scores)]
    return record(rows, method, task)


def test_pairs_count_what_was_lost_and_gained():
    a, b = items("A", [0.0, 0.0, 1.0, 1.0, 0.0]), items("B", [1.0, 1.0, 0.0, 1.0, 0.0])
    (pair,) = pairing.compare(joined([a, b, items("B", [1.0], "other")]), "A", "B")
    assert (pair["task"], pair["items"], pair["lost"], pair["gained"]) == ("t", 5, 2, 1)
    assert pair["difference"] == pytest.approx(-0.2) and pair["low"] < -0.2 < pair["high"] and pair["p"] == 1.0
    story = joined([items(name, [score] * 3, document="one story") for name, score in (("A", 1.0), ("B", 0.0))])
    (alone,) = pairing.compare(story, "A", "B")
    assert (alone["difference"], alone["low"], alone["high"]) == (1.0, None, None)  # one document shows no spread
    assert (pair["clusters"], alone["clusters"]) == (5, 1)


def test_runs_are_joined_by_what_was_asked(tmp_path):
    first, second = items("m", [1.0] * 4), items("m", [0.0] * 3)
    first["hash"], second["hash"] = ["h0", "h1", "h1", "h2"], ["h2", "h1", "h7"]
    found, alone = pairing.side_by_side(first, second, "m", "m")
    assert sorted(found[found.method == "A"].hash) == ["h1", "h2"] and alone == 3
    assert [pair["difference"] for pair in pairing.compare(found, "A", "B")] == [1.0]
    with pytest.raises(UserError, match=r"holds no record.*\nMake one with `ftp-lightning evaluate`"):
        pairing.record_of(tmp_path)


def test_interval_of_a_ratio_holds_it_and_says_when_it_is_not_known():
    dense, pruned = [1.0] * 60 + [0.0] * 40, [1.0] * 54 + [0.0] * 46
    found = statistics.ratio_interval([(pruned, dense, 0.0, None, None)])
    assert found.value == pytest.approx(0.9) and 0.8 < found.low < 0.9 < found.high <= 1.0
    same = statistics.ratio_interval([(dense, dense, 0.25, None, None)])
    assert same.value == 1 and 0.9 < same.low < 1 < same.high < 1.1  # equal on 100 items is not equal beyond doubt
    unknown = statistics.ratio_interval([(pruned, [1.0, 0.0] * 50, 0.5, None, None)])
    assert (unknown.low, unknown.note) == (None, "dense is at chance: no ratio")
    alone = statistics.ratio_interval([(pruned, dense, 0.0, None, None), (pruned, dense, 0.0, ["a"] * 100, None)])
    assert (alone.value, alone.low, alone.note) == (pytest.approx(0.9), None, "one document: no interval")
    assert statistics.ratio_interval([]) is None


def test_seeds_that_differ_widen_a_ratio():
    dense, pruned = [1.0] * 120, [1.0] * 40 + [0.0] * 20 + [1.0] * 20 + [0.0] * 40
    one, three = (statistics.ratio_interval([(pruned, dense, 0.0, None, s)]) for s in (None, [0] * 40 + [1] * 80))
    assert one.value == three.value and three.high - three.low > 2 * (one.high - one.low)


def test_few_documents_widen_a_ratio():
    rng = random.Random(0)
    dense = [float(rng.random() < 0.8) for _ in range(200)]
    pruned = [one * (rng.random() < 0.9) for one in dense]
    many, few = (
        statistics.ratio_interval([(pruned, dense, 0.0, [i * n // 200 for i in range(200)], None)]) for n in (100, 4)
    )
    assert many.value == few.value and few.high - few.low > 1.2 * (many.high - many.low)


def test_a_pooled_group_pairs_by_subject_and_id():
    """Ids start anew in every subject of a group: 20 subjects of 10 items are 200 items, not 10 documents."""

    def sample(subject, i):
        asked = [[f"{subject} {i}", choice] for choice in "abcd"]
        about = {"filtered_resps": [[0.0, False]] * 4, "filter": "none", "target": i % 4}
        return {"doc_id": i, "doc": {"question": f"{subject} {i}"}, "arguments": asked, "acc": 1.0, **about}

    subjects = [f"mmlu_s{k}" for k in range(20)]
    log = {name: [sample(name, i) for i in range(10)] for name in subjects}
    found = summaries({"samples": log, "results": {}, "group_subtasks": {"mmlu": subjects}}, ["mmlu"], [])
    told = found["mmlu"]["items"]
    a = record([one | {"score": float(n % 3 > 0)} for n, one in enumerate(told)], "x", "mmlu")
    b = record([one | {"score": float(n % 2)} for n, one in enumerate(told)], "dense", "mmlu")
    (pair,) = pairing.compare(joined([a, b]), "x", "dense")
    assert pair["items"] == 200 and difference(joined([a, b]), "x", "dense", "score").clusters == 200


def test_chance_of_a_task_is_its_best_constant_answer():
    def item(label, choices=("no", "yes")):
        told = None if label is None else [list(choices), label]
        return {"label": told, "chance": 0.5}

    labels = [1] * 622 + [0] * 378  # BoolQ's validation split
    assert summarize([item(label) for label in labels], {})["chance"] == 0.622
    assert summarize([item(label) for label in [0, 1, 1]], {})["chance"] == 0.5
    assert summarize([item(None) for _ in labels], {})["chance"] == 0.5  # labels that are not known
    other = [item(label, (f"a{n}", f"b{n}")) for n, label in enumerate(labels)]  # no answer fits all items
    assert summarize(other, {})["chance"] == 0.5


def test_interval_of_a_score():
    found = statistics.clustered([1.0, 0.0, 1.0])
    assert (found.low, found.high) == statistics.wilson_interval(2, 3)
    scores = statistics.clustered([0.5, 0.7, 0.9])
    assert (scores.low + scores.high) / 2 == pytest.approx(0.7) and statistics.clustered([0.5]).low is None


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
