"""A search on a task looks at some of its documents, and no evaluation of what it found counts these."""

import json
import warnings
from pathlib import Path

import pytest
from ftp_models import ftp_models
from tiny import random_llama

from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.harness.seen import furthest, place
from ftp_lightning.evaluation.harness.tasks import run_tasks
from ftp_lightning.models import load_tokenizer
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import StaticRouter
from ftp_lightning.schedule import Schedule
from ftp_lightning.schedule_family import ScheduleFamily
from ftp_lightning.search.accuracy import TaskAccuracy, seen_by, task_items

ROWS, TASK = 24, "winogrande"
HALF = Schedule([0.0, 0.5, 0.5])
TINY = "--model random:tiny --device cpu --tracking none --prompt_tokens 96 --continuation_tokens 16".split()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / f"{TASK}_validation.jsonl"
    rows = [
        {"sentence": f"The box {n} is not in the bag because the _ was {'big' if n % 3 else 'red'}.",
         "option1": "box", "option2": "bag", "answer": str(1 + n % 2)}
        for n in range(ROWS)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def items(file):
    return task_items(TASK, {"validation": file})


@pytest.fixture(scope="module")
def loaded():
    tokenizer = load_tokenizer("embedded")
    return random_llama(len(tokenizer), num_key_value_heads=2, initializer_range=0.2), tokenizer


@pytest.fixture
def asked(loaded, file):
    """Ask the dense model; returns the summary and the sentences it was asked."""
    with ftp_models(*loaded) as make:

        def ask(**how):
            lm = make()
            found = run_tasks(lm, {TASK: {"validation": file}}, **how)[TASK]
            return found, {str(account.request) for account in lm.accounts}

        yield ask


def test_a_search_looks_at_the_documents_of_lowest_place_alone(items, file):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    low = {row["sentence"] for row in rows if place(row) < 0.5}
    assert 0 < len(low) < ROWS and {item.document["sentence"] for item in items} == low
    assert [item.document for item in task_items(TASK, {"validation": file}, 3)] == [
        item.document for item in items[:3]
    ]
    assert seen_by(items[:3]) == {TASK: place(items[2].document)}


def test_the_loss_is_the_share_of_wrong_answers(loaded, items):
    make = lambda schedule: TokenPruner(StaticRouter(), schedule, kv="keep")  # noqa: E731
    measured = TaskAccuracy(*loaded, items, make, chunk=len(items))
    answers = iter([(float(n % 2), False) for n in range(99)])  # every time the second choice is the likelier
    measured._lm.loglikelihood = lambda requests, **_: [next(answers) for _ in requests]
    wrong = [item.document["answer"] == "1" for item in items]
    assert 0 < sum(wrong) != len(items) / 2
    assert measured(HALF) == sum(wrong) / len(items)


def test_what_was_searched_is_left_out_and_nothing_else(asked, items):
    whole, _ = asked()
    found, requests = asked(seen=seen_by(items[:4]))
    assert (whole["left_out"], found["left_out"]) == (0, 4)
    assert (len(whole["items"]), len(found["items"])) == (ROWS, ROWS - 4)
    hashes = {item["hash"] for item in found["items"]}
    assert hashes < {item["hash"] for item in whole["items"]}
    for item in items[:4]:
        assert not any(item.document["sentence"].split("_")[0] in request for request in requests)
    assert len(asked(seen={"piqa": 1.0})[0]["items"]) == ROWS
    with pytest.raises(UserError, match="has looked at all documents of winogrande"):
        asked(seen={TASK: 1.0})


def test_a_schedule_carries_what_it_was_selected_on_through_every_change(tmp_path):
    seen = Schedule(HALF.sparsity, seen={TASK: 0.25})
    assert seen == HALF and seen.key() == HALF.key() and HALF.seen == {}
    seen.save(tmp_path / "schedule.json")
    ScheduleFamily([Schedule([0.0, 0.1, 0.1]), seen]).save(tmp_path / "schedules.json")
    router, other = StaticRouter(), Schedule([0.1, 0.1, 0.1], seen={TASK: 0.1, "piqa": 0.5})
    TokenPruner(router, seen, kv="keep").save(tmp_path / "pruned")
    loaded = TokenPruner.load(tmp_path / "pruned")
    for schedule in (
        Schedule.load(tmp_path / "schedule.json"),
        ScheduleFamily.load(tmp_path / "schedules.json").at(0.2),
        loaded.schedule,
        seen.under("keep"),
        loaded.changed(kv="evict").schedule,
        loaded.with_schedule(HALF).schedule,  # its router was trained under the other one
    ):
        assert schedule.seen == {TASK: 0.25}
    assert loaded.with_schedule(other).schedule.seen == furthest([seen.seen, other.seen]) == {TASK: 0.25, "piqa": 0.5}


@pytest.mark.parametrize("seen", [{TASK: 1.5}, {TASK: "all"}, [TASK]])
def test_a_broken_record_is_refused(tmp_path, seen):
    HALF.save(tmp_path / "schedule.json")
    record = json.loads((tmp_path / "schedule.json").read_text())
    (tmp_path / "schedule.json").write_text(json.dumps(record | {"seen": seen}))
    with pytest.raises(UserError, match="seen must give a number"):
        Schedule.load(tmp_path / "schedule.json")


def test_evaluate_leaves_out_what_search_has_seen_for_every_method(command, file):
    data = ["--task_data", file.parent]
    how = ["--criterion", "accuracy", "--task", TASK, *data, "--windows", "4", "--generations", "0"]
    status, _, err = command("search", *TINY, *how, "--allocations", "uniform,ramp", "--output", "found")
    assert status == 0, err
    assert list(json.loads(Path("found/schedule.json").read_text())["seen"]) == [TASK]
    tasks = ["--tasks", TASK, *data, "--windows", "2", "--compare", "uniform"]
    status, _, err = command("evaluate", *TINY, *tasks, "--schedule", "found/schedule.json", "--output", "judged")
    assert status == 0 and f"{TASK}: 4 documents that a schedule was searched on are left out" in err, err
    results = json.loads(Path("judged/results.json").read_text())
    cells = [results["dense"]["tasks"], *(method["tasks"] for method in results["methods"])]
    assert [cell[TASK]["n"] for cell in cells] == [ROWS - 4] * 3 and cells[0][TASK]["left_out"] == 4


def test_lm_eval_itself_is_told_once_what_a_search_has_seen(loaded, file, items):
    """Its API asks for an answer to every request, so a model cannot leave documents out."""
    pruner = TokenPruner(StaticRouter(), Schedule(HALF.sparsity, seen=seen_by(items[:4])), kv="keep")
    with ftp_models(*loaded) as make:
        lm = make(pruner=pruner)
        with pytest.warns(UserWarning, match=f"{TASK}: 4 of {ROWS} documents .*ftp-lightning evaluate") as told:
            run_tasks(lm, {TASK: {"validation": file}})
            run_tasks(lm, {TASK: {"validation": file}})
        assert len([one for one in told if TASK in str(one.message)]) == 1
    with ftp_models(*loaded) as make, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run_tasks(make(pruner=pruner), {TASK: {"validation": file}}, seen=pruner.schedule.seen)
