"""Which text a stage draws: by its seed, and never what another stage has chosen by."""

import pytest

from ftp_lightning.__main__ import parse
from ftp_lightning.models import load, load_tokenizer
from ftp_lightning.stages.inputs import mixed_windows
from ftp_lightning.stages.methods import choose_methods
from ftp_lightning.studies.bench import bench_of

TINY = "--model random:tiny --device cpu --tracking none --prompt_tokens 96 --continuation_tokens 16".split()


def rows(windows):
    return {tuple(row) for row in windows.input_ids.tolist()}


@pytest.mark.parametrize("stage", ["search", "train", "sensitivity"])
def test_another_seed_draws_other_windows(stage):
    tokenizer = load_tokenizer("random:tiny")
    one, again, other = (
        mixed_windows(parse(stage, [*TINY, f"--seed={seed}"]), tokenizer, 4, 0.5).hash() for seed in (0, 0, 1)
    )
    assert one == again != other


def test_a_study_measures_on_other_windows_than_its_training_was_validated_on():
    trial = parse("trial", [*TINY, "--test_windows=4", "--items=2", "--validation_windows=4"])
    bench = bench_of(trial)
    validated = mixed_windows(trial, load_tokenizer("random:tiny"), 4, trial.recall_share, "validation")
    assert trial.test_split == "validation" and not rows(bench.windows) & rows(validated)


def test_the_random_baseline_is_drawn_by_the_seed():
    model, _ = load("random:tiny")
    asked = [parse("evaluate", [*TINY, "--compare=random", f"--seed={seed}"]) for seed in (0, 7)]
    assert [choose_methods(one, model)[0][1].router.seed for one in asked] == [0, 7]
