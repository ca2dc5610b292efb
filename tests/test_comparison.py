"""Methods compared on tasks: only the items that need the prompt are asked, and their answers are the same."""

import json
from dataclasses import replace

import pytest
from pandas import DataFrame

from ftp_lightning import Schedule, StaticRouter, TokenPruner
from ftp_lightning.data.sources import load_documents
from ftp_lightning.evaluation.record import kept
from ftp_lightning.studies.comparison import Compared, Comparison
from ftp_lightning.studies.method_table import kept_table

TOKENS, ITEMS = 200, 8


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    for part in ("calibration", "validation", "test"):
        (folder / part).mkdir()
        for number, text in enumerate(load_documents("embedded", "test")[:3]):
            (folder / part / f"{number}.txt").write_text(text)
    return Comparison(folder / "out", str(folder), "", "", ITEMS, (("embedded", TOKENS),))


def test_only_items_that_need_the_prompt_are_asked(comparison):
    dense = comparison.measure(Compared("embedded", "multi_key_recall", 0, 0.0, "dense"))
    bench = comparison.bench("embedded", "multi_key_recall", 0)
    pruner = TokenPruner(StaticRouter(), Schedule.default(12, 0.4))
    few = bench.measure("few", pruner)
    asked = dict(bench.ask.only)
    bench.ask.only = None
    every = bench.measure("every", pruner)
    task = lambda items: items[items["task"] == "multi_key_recall"]  # noqa: E731

    assert len(task(every)) == ITEMS == len(dense[dense["task"] == "multi_key_recall"])
    needed = task(every)[task(every)["needed"]]
    assert 0 < len(needed) < ITEMS and needed["item"].tolist() == asked["multi_key_recall"]
    same = ["item", "id", "hash", "right", "document", "answers", "flops"]
    assert task(few)[same].reset_index(drop=True).equals(needed[same].reset_index(drop=True))
    assert kept(task(few)) == kept(task(every))


def test_an_item_is_asked_where_none_needs_the_prompt(comparison, monkeypatch):
    """Of a model that answers nothing right."""
    from ftp_lightning.evaluation import bench

    monkeypatch.setattr(bench, "with_need", lambda items, *_: items.assign(needed=False, dense_right=False))
    found = comparison.bench("embedded", "multi_key_recall", 1)
    assert found.ask.only == {"multi_key_recall": [0]}
    assert len(found.measure("none", TokenPruner(StaticRouter(), Schedule.uniform(12, 0.2)))) == 1 + 1


def test_own_answers_are_those_to_the_questions_where_no_prompts_are_given(comparison, tmp_path):

    record = {
        "context": "Ada has a red boat.",
        "question": "What has Ada?",
        "answers": ["a red boat"],
        "title": "boats",
    }
    squad = tmp_path / "squad.jsonl"
    squad.write_text("".join(json.dumps(record | {"id": str(number)}) + "\n" for number in range(2)))
    asking = replace(comparison, squad=str(squad), output=tmp_path)
    lines = [json.loads(line) for line in open(asking.own_prompts())]
    assert lines == [{"prompt": "Ada has a red boat.\n\nWhat has Ada?", "document": "boats"}] * 2
    assert replace(asking, prompts="mine.jsonl").own_prompts() == "mine.jsonl"


def test_a_table_has_a_column_per_cut_and_the_interval_of_each_number():
    cell = {"model": "m", "task": "own_answers", "method": "static", "seed": 0, "needed": True, "flops": 80.0}
    cell |= {"dense_flops": 100.0, "dense_right": True}
    rows = [
        cell | {"cut": cut, "item": n, "document": n, "right": n < kept_ones, "kl": 0.2 + 0.1 * (n % 2)}
        for cut, kept_ones in ((0.1, 20), (0.2, 10))
        for n in range(20)
    ]
    table = kept_table(DataFrame(rows))
    assert table.startswith("### m, own_answers: 20 answers\n")
    head, _, row = table.splitlines()[2:5]
    assert [part.strip() for part in head.split("|")[2:4]] == ["10% of the FLOPs", "20% of the FLOPs"]
    assert [part.strip() for part in row.split("|")[1:4]] == [
        "static", "100 [84, 100] (20%, KL 0.25 [0.23, 0.27])", "50 [30, 70] (20%, KL 0.25 [0.23, 0.27])"
    ]  # fmt: skip
