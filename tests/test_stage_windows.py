"""Which text a stage draws: by its seed, and never what another stage has chosen by."""

import pytest
from pandas import DataFrame

from ftp_lightning.__main__ import parse
from ftp_lightning.evaluation.outcome import retention, task_cell
from ftp_lightning.evaluation.record import record
from ftp_lightning.models import load, load_tokenizer
from ftp_lightning.stages.inputs import unanswered_rows
from ftp_lightning.stages.methods import choose_methods
from ftp_lightning.studies.bench import trial_bench

TINY = "--model random:tiny --device cpu --tracking none --prompt_tokens 96 --continuation_tokens 16".split()


def rows(windows):
    return {tuple(row.prompt + row.continuation) for row in windows.rows}


@pytest.mark.parametrize("stage", ["search", "train", "sensitivity"])
def test_another_seed_draws_other_windows(stage):
    tokenizer = load_tokenizer("random:tiny")
    one, again, other = (
        unanswered_rows(parse(stage, [*TINY, f"--seed={seed}"]), tokenizer, 4, 0.5).hash() for seed in (0, 0, 1)
    )
    assert one == again != other


def test_a_study_measures_on_other_windows_than_its_training_was_validated_on():
    trial = parse("trial", [*TINY, "--test_windows=4", "--items=2", "--validation_windows=4"])
    (measured,) = trial_bench(trial).texts.values()
    validated = unanswered_rows(trial, load_tokenizer("random:tiny"), 4, trial.recall_share, "validation")
    assert trial.test_split == "validation" and not rows(measured) & rows(validated)


def test_the_random_baseline_is_drawn_by_the_seed():
    model, _ = load("random:tiny")
    asked = [parse("evaluate", [*TINY, "--compare=random", f"--seed={seed}"]) for seed in (0, 7)]
    assert [choose_methods(one, model)[0][1].router.seed for one in asked] == [0, 7]


def test_a_task_is_near_chance_by_the_dense_models_error():
    """A pruned model has another error; it does not decide whether the task measures something."""

    def answers(right, of=100):
        scores = [1.0] * right + [0.0] * (of - right)
        same = {"method": "m", "task": "t", "seed": 0, "metric": "acc", "chance": 0.5}
        return DataFrame({"score": scores, "document": range(of), "item": range(of)}).assign(**same)

    few, many = answers(3, 4), answers(75)
    assert task_cell(few, many, {}, False)["skill"] == 1.0 and not task_cell(few, many, {}, False)["near_chance"]
    assert task_cell(many, few, {}, False)["near_chance"]


def test_an_interval_leaves_out_items_that_dense_was_not_asked():
    rows = [{"score": score, "document": name} for score, name in zip([1, 0, 1, 1, 0, 1], "aabbcc", strict=True)]
    pruned = record(rows, "m", "t")
    dense = record([{"score": 1.0, "document": row["document"]} for row in rows], "dense", "t")
    whole = retention(pruned.iloc[2:], dense.iloc[2:], ["t"])
    assert retention(pruned, dense.iloc[2:], ["t"])["retention_interval"] == whole["retention_interval"] is not None
