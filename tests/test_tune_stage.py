"""`tune`: from prompts to a pruner, on the embedded model; what cannot be tuned is told in a sentence."""

import json
import re
from dataclasses import replace
from html import unescape

import pytest
from test_cli import TINY, files, refused

from ftp_lightning import Schedule, StaticRouter, TokenPruner, load_pruned
from ftp_lightning.costs.request import planned_cut
from ftp_lightning.data.rows import Row, Rows
from ftp_lightning.data.sources import load_documents
from ftp_lightning.evaluation import own_answers
from ftp_lightning.evaluation.statistics import Interval
from ftp_lightning.models import load
from ftp_lightning.routing import UntrainedRouter
from ftp_lightning.stages.tune import TuneStage
from ftp_lightning.tuning import measured, parts, recipes
from ftp_lightning.tuning.allowance import Allowance
from ftp_lightning.tuning.measured import Measured
from ftp_lightning.tuning.parts import LEAST, repeats, split_rows
from ftp_lightning.tuning.recipes import RECIPES, given
from ftp_lightning.tuning.tuner import Candidate, Rung, Tuned, Tuner

SMALL = [*TINY, "--prompts", "embedded", "--prompt_tokens", 32, "--continuation_tokens", 5, "--limit", 44]
QUICK = [*SMALL, "--keep", 0.5, "--cuts", "0.02,0.1,0.5", "--output", "out"]


@pytest.fixture
def one_recipe(monkeypatch):
    """Only the recipe that fits nothing."""
    chosen = tuple(recipe for recipe in RECIPES if recipe.name == "late blocks")
    monkeypatch.setattr(recipes, "RECIPES", chosen)


def test_a_pruner_its_curve_and_its_page(command, tmp_path, one_recipe):
    status, out, err = command("tune", *QUICK)
    assert status == 0, err
    assert "keeps at least 50 % of the model's own answers" in out and "own answers take about" in err
    found = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert found["recipe"] == "late blocks" and found["prompts"]["validation"] == 22
    holding = [row for row in found["curve"] if row["holds"]]
    assert found["chosen"] == holding[-1] and holding[-1]["kept_low"] >= 0.5 and holding[-1]["speed"] > 0
    assert [row["cut"] for row in found["held_out"]] == [found["chosen"]["cut"]] and found["confirmed"]
    page = unescape((tmp_path / "out" / "report.html").read_text())
    assert found["sentences"][0] in page and "<svg" in page
    assert (tmp_path / "out" / "report" / "tune.csv").read_text().count("validation") == len(found["curve"])

    pruner = TokenPruner.load(tmp_path / "out" / "pruned")
    assert pruner.scheduled.budget == pytest.approx(found["chosen"]["budget"])
    assert len(pruner.family.schedules) == len(found["family"]) == 3
    model, _ = load_pruned(tmp_path / "out" / "pruned")
    model.pruner.detach()
    about = [*TINY, "--pruned", "out/pruned", "--prompt", "Once upon a time", "--max_new_tokens", 1, "--pairs", 1]
    assert command("generate", *about, "--budget", 0.05, "--output", "g")[0] == 0
    refused(command("generate", *about, "--budget", 0.9, "--output", "h"), "budget is 0.9", "at most")

    status, _, err = command("tune", *QUICK)
    assert status == 0 and "done already" in err
    refused(command("tune", *QUICK, "--keep", 0.6), "keep 0.5 -> 0.6")


def test_nothing_measured_is_measured_again_after_a_kill(command, tmp_path, one_recipe, monkeypatch):
    asked, real = [], measured.evaluate_rows

    def evaluate(model, rows, pruner, *rest):
        if len(asked) == 4:
            asked.append(None)
            raise KeyboardInterrupt
        asked.append((pruner.scheduled.key(), tuple(tuple(row.prompt) for row in rows.rows)))
        return real(model, rows, pruner, *rest)

    monkeypatch.setattr(measured, "evaluate_rows", evaluate)
    assert command("tune", *QUICK)[0] == 130
    state = json.loads(json.loads((tmp_path / "out" / "state.json").read_text())["state"])
    assert 0 < state["answered"] < state["seconds"]  # from which the limits of a resumed run are taken
    assert command("tune", *QUICK)[0] == 0
    done = [one for one in asked if one]
    prompts = [(key, prompt) for key, rows in done for prompt in rows]
    assert len(prompts) == len(set(prompts))
    first = (tmp_path / "out" / "tune.json").read_text()
    asked.clear()
    assert command("tune", *QUICK, "--overwrite")[0] == 0 and asked == []
    again = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert [row["kept"] for row in again["curve"]] == [row["kept"] for row in json.loads(first)["curve"]]


def failed(answer, *fragments):
    """Asserts status 2 and a message after the lines of progress."""
    status, _, err = answer
    assert status == 2 and "Traceback" not in err
    for fragment in fragments:
        assert fragment in err


def test_no_cut_holds(command, tmp_path, one_recipe):
    answer = command("tune", *SMALL, "--keep", 0.6, "--cuts", "0.45,0.5", "--output", "out")
    failed(answer, "no cut keeps 60 %", "45%, the smallest", "validation answers", "--keep")
    assert not (tmp_path / "out").exists() and list((tmp_path / "runs" / "own_answers").iterdir())


def test_held_out_prompts_that_disagree_are_told(command, tmp_path, one_recipe, monkeypatch):
    """Their answers are replaced by others, so that no cut keeps them."""
    real = parts.split_rows

    def spoilt(rows, seed):
        found = real(rows, seed)
        wrong = [replace(row, continuation=[7] * 5 + [8]) for row in found["held_out"].rows]
        return found | ({"held_out": Rows(wrong)} if rows.continuation_tokens else {})

    monkeypatch.setattr(parts, "split_rows", spoilt)
    failed(command("tune", *QUICK), "no cut keeps 50 %", "keeps 0.0%", "held-out answers")


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


PROMPTS = [text[at : at + 150] for text in load_documents("embedded", "training") for at in (0, 150)][:60]


@pytest.mark.parametrize(
    ("records", "flags", "fragments"),
    [
        ([{"prompt": text} for text in PROMPTS[:12]], [], ["12 prompts", "at least 30"]),
        ([*({"prompt": text} for text in PROMPTS), {"text": "More."}], [], ["line 61", "other records have one"]),
        ([{"prompt": " "} for _ in range(40)], [], ["no prompt to use", "without words"]),
        (
            [{"prompt": text} for text in PROMPTS[:40]],
            ["--continuation_tokens", 2010, "--prompt_tokens", 8],
            ["more than the 38 tokens", "--continuation_tokens"],
        ),
        ([{"prompt": PROMPTS[0]} for _ in range(60)], [], ["1 prompts to use"]),
        ([{"prompt": text} for text in PROMPTS], ["--keep", 1.0], ["keep is 1", "no number of prompts", "0.886"]),
        (
            [{"prompt": text} for text in PROMPTS],
            ["--keep", 0.99],
            ["30 of them for validation", "0.886", "762 prompts"],
        ),
    ],
)
def test_prompts_that_cannot_be_tuned_on_are_told(command, tmp_path, records, flags, fragments):
    lines(tmp_path / "prompts.jsonl", records)
    refused(command("tune", "--prompts", "prompts.jsonl", *flags, "--output", "out"), "", *fragments)
    assert "out" not in files(tmp_path)


@pytest.mark.parametrize(
    "answered",
    [
        lambda text: {"instruction": text},
        lambda text: {"instruction": text, "input": "", "output": None},
        lambda text: {"instruction": text, "output": 7},
        lambda text: {"prompt": text, "completion": " "},
        lambda text: {"prompt": text, "completion": 7},
        lambda text: {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": " "}]},
    ],
)
def test_answers_of_records_are_not_read(tmp_path, answered):
    lines(tmp_path / "prompts.jsonl", map(answered, PROMPTS))
    found = parts.read_prompts(str(tmp_path / "prompts.jsonl"), load("embedded")[1], 32, 900, None, 0)
    assert len(found) == 60 and not any(found.left_out.values())


@pytest.mark.parametrize("line", [5, None])
def test_a_line_that_is_no_record_is_told(command, tmp_path, line):
    lines(tmp_path / "prompts.jsonl", [*({"text": text} for text in PROMPTS), line])
    refused(command("tune", "--prompts", "prompts.jsonl", "--output", "out"), "line 61", "must be an object")


def test_texts_of_which_one_is_far_longer_than_the_others_are_told(command, tmp_path):
    """A text goes to one part as a whole, so that another part may get none."""
    for place, text in enumerate([" ".join(load_documents("embedded", "training")[:9]), *PROMPTS[:22]]):
        (tmp_path / f"{place:02}.txt").write_text(text)
    flags = ["--prompt_tokens", 32, "--keep", 0.3, "--output", "out"]
    refused(command("tune", "--prompts", ".", *flags), "0 of these are left for the choice", "Give more texts")


def test_a_model_that_repeats_itself_and_one_that_is_silent_are_told(command, tmp_path, monkeypatch):
    lines(tmp_path / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    flags = ["--prompts", "prompts.jsonl", "--keep", 0.5, "--output", "out"]

    def saying(answer):
        monkeypatch.setattr(own_answers, "greedy", lambda model, batch, *_: [answer] * len(batch["input_ids"]))

    for seed, (answer, told) in enumerate(
        [([5, 6, 7] * 8, "repeats itself in 60 of 60"), ([5, 6], "the same answer"), ([1], "answers none of the 60")]
    ):
        saying(answer)
        failed(command("tune", *TINY, *flags, "--seed", seed), told)  # another seed is another random model


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        ([], ["--prompts"]),
        (["--prompts", "missing.jsonl"], ["missing.jsonl"]),
        (["--prompts", "embedded", "--keep", "0"], ["keep is 0"]),
        (["--prompts", "embedded", "--cuts", "0.3,0.2"], ["cuts must rise"]),
        (["--prompts", "embedded", "--limit", "10", "--keep", "0.3"], ["limit is 10", "at least 30"]),
        (["--prompts", "embedded", "--data", "x.txt"], ["--prompts", "--data"]),
        (
            ["--prompts", "embedded", "--minutes", "0.0001", "--keep", "0.5"],
            ["allows about 0 of", "at least 30", "Give --minutes"],
        ),
    ],
)
def test_bad_flags_are_told(command, tmp_path, flags, fragments):
    refused(command("tune", *flags, "--output", "out"), *fragments)
    assert files(tmp_path) == []


def test_a_pruner_that_is_given_costs_as_a_recipe_does(command, tmp_path):
    TokenPruner(StaticRouter(), Schedule([0.0] * 11 + [0.5], kv="keep")).save(tmp_path / "p")
    flags = ["tune", "--prompts", "embedded", "--estimate", "1x24"]
    told = [command(*flags, *more)[1] for more in ([], ["--pruned", "p"])]
    alone, both = (float(re.search(r"; (\S+) FLOP", one).group(1)) for one in told)
    assert 1.02 < both / alone < 1.2  # of seven recipes one more
    stage = TuneStage(prompts="embedded", keep=0.5, cuts=(0.1, 0.2, 0.3))
    rows = {part: Rows([Row([1], [], "plain", place) for place in range(20)]) for part in parts.SHARES}
    assert stage._check_reachable(rows, 8) == {"choice": 20 * 25, "validation": 20 * 4, "confirmation": 20 * 2}


def test_documents_stay_together_and_seeds_shuffle_them():
    rows = Rows([Row([1, place], [], "plain", place // 3) for place in range(300)])
    found = split_rows(rows, 0)
    assert {name: len(one) for name, one in found.items()} == pytest.approx(
        {"fit": 45, "choice": 45, "validation": 150, "held_out": 60}, abs=3
    )
    homes = [set(one.documents) for one in found.values()]
    assert sum(map(len, homes)) == 100 == len(set().union(*homes))
    assert split_rows(rows, 0)["fit"].documents == found["fit"].documents != split_rows(rows, 1)["fit"].documents
    assert LEAST == 30


def test_answers_that_go_round_in_circles():
    assert repeats([1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 7, 7, 7, 7]) and repeats([9, 8] * 8)
    assert not repeats([7] * 8) and not repeats(list(range(40)))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_makes_a_family_that_can_be_stored(recipe, tmp_path, embedded_ground):
    pruner = recipe.fit(embedded_ground)
    schedules = recipe.schedules(embedded_ground, pruner, (0.1, 0.3, 0.99))
    assert list(schedules) == [0.1, 0.3]
    assert all(isinstance(one, Schedule) and one.kv for one in schedules.values())
    family = recipes_family(schedules)
    pruner.changed(schedule=schedules[0.3], family=family).save(tmp_path / "p")
    again = TokenPruner.load(tmp_path / "p")
    assert again.family == family and again.at(schedules[0.1].budget).schedule == schedules[0.1]


def test_a_pruner_that_is_given_is_tried_from_its_last_block_down(embedded_ground):
    form = Schedule([0.0] * 6 + [0.8, 0.0, 0.8, 1.0, 1.0, 1.0], kv="keep")
    recipe = given(TokenPruner(StaticRouter(), form, least_tokens=99))
    pruner = recipe.fit(embedded_ground)
    assert pruner.least_tokens == 0
    schedules = recipe.schedules(embedded_ground, pruner, (0.05, 0.2, 0.3, 0.9))
    assert list(schedules) == [0.05, 0.2, 0.3]
    for cut, schedule in schedules.items():
        found = planned_cut(embedded_ground.model, pruner.with_schedule(schedule), embedded_ground.length)
        assert found == pytest.approx(cut, abs=5e-3)
        pruned = [block for block, s in enumerate(schedule.sparsity) if s]
        routed = [6, 8, 9, 10, 11]
        assert pruned == routed[-len(pruned) :] and schedule.kv == form.kv


def test_another_pruner_that_is_given_is_not_taken_for_the_former(tmp_path, embedded_ground):
    found = {name: embedded_ground.rows for name in parts.SHARES}
    tuner = Tuner(Measured(embedded_ground.model, tmp_path), found, 0.5, (0.1,), Allowance(60.0))
    schedule = Schedule([0.0] * 11 + [0.5], kv="keep")
    for pruner in (TokenPruner(StaticRouter(), schedule), TokenPruner(UntrainedRouter(("rank",)), schedule)):
        assert type(tuner.prepared(given(pruner)).router) is type(pruner.router)


def recipes_family(schedules):
    from ftp_lightning import ScheduleFamily

    return ScheduleFamily(list(schedules.values()))


@pytest.fixture(scope="module")
def embedded_ground():
    from ftp_lightning.data.text import prompt_ids
    from ftp_lightning.models import load
    from ftp_lightning.tuning.recipes import Ground

    model, tokenizer = load("embedded")
    ids = [prompt_ids(tokenizer, text)[:40] for text in PROMPTS[:4]]
    return Ground(model, Rows([Row(one, [7, 9], "plain", place) for place, one in enumerate(ids)]), 256)


def test_what_no_schedule_needs_is_not_stored(embedded_ground):
    recipe = next(one for one in RECIPES if one.name == "late blocks, fitted")
    pruner = recipe.fit(embedded_ground)
    schedules = recipe.schedules(embedded_ground, pruner, (0.1, 0.2))
    found = Candidate("", pruner, schedules, [])
    rung = Rung(0.2, 0.2, 0.2, *[Interval(1.0, 1.0, 1.0, 9, 9)] * 2, 0.0)
    tuned = Tuned(found, [], [], [rung], 1, [rung], 1, False).pruner
    assert tuned.schedule == schedules[0.2] and tuned.family == found.at(0.1).family
    zero = [not bool(one.any()) for one in tuned.compensation.tensors["block.bias"]]
    assert zero == [s == 0.0 for s in schedules[0.2].sparsity]
