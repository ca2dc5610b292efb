"""Every file under sweeps/: valid by wandb's own schema, expanded as it expands it, started as its agent starts it."""

import shlex
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from ftp_lightning.__main__ import STAGES, parse
from ftp_lightning.errors import UserError
from ftp_lightning.studies.sweep import SweepStage
from ftp_lightning.studies.sweep_file import arguments, expand, read_sweep, with_values

ROOT = Path(__file__).resolve().parent.parent
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
GRIDS = [path for path in SWEEPS if yaml.safe_load(path.read_text(encoding="utf-8"))["method"] == "grid"]
DRAWN = [path for path in SWEEPS if path not in GRIDS]
PROMISED = "allocation budgets choice data decode factors kv losses routers skip window".split()
TINY = {
    "model": "random:tiny", "device": "cpu", "prompt_tokens": 96, "continuation_tokens": 8, "test_windows": 2,
    "items": 2, "validation_windows": 2, "tracking": "none",
}  # fmt: skip


def name(path: Path) -> str:
    return path.stem


@pytest.fixture(scope="module")
def engine():
    """wandb's own `sweeps`, which `make setup` puts beside the other packages, as it pins an older numpy."""
    sys.path.append(str(Path(sys.prefix) / "sweeps"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("sweeps", reason="wandb's sweeps is not installed, `make setup` does it")
    sys.path.remove(str(Path(sys.prefix) / "sweeps"))


def test_every_promised_study_is_there():
    assert set(PROMISED) <= set(map(name, GRIDS))


@pytest.mark.parametrize("path", SWEEPS, ids=name)
def test_wandbs_own_schema_takes_it(path, engine):
    assert engine.schema_violations_from_proposed_config(yaml.safe_load(path.read_text(encoding="utf-8"))) == []


def test_that_schema_refuses_what_is_none(engine):
    sweep = yaml.safe_load(GRIDS[0].read_text(encoding="utf-8"))
    assert engine.schema_violations_from_proposed_config(sweep | {"bugdet": 3}) != []


@pytest.mark.parametrize("path", GRIDS, ids=name)
def test_the_grid_is_that_of_wandbs_engine(path, engine):
    sweep, runs = read_sweep(str(path)), []
    while (run := engine.next_run(sweep, runs, validate=False)) is not None:
        run.state = engine.RunState.finished
        runs.append(run)
    theirs = [{key: value["value"] for key, value in run.config.items()} for run in runs]
    assert expand(sweep) == theirs


@pytest.mark.parametrize("path", GRIDS, ids=name)
def test_the_command_line_is_that_of_wandbs_agent_and_parses(path):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    sweep = read_sweep(str(path))
    for run in expand(sweep):
        stage, words = arguments(sweep, run)
        assert (
            words == create_sweep_command_args({"args": {key: {"value": value} for key, value in run.items()}})["args"]
        )
        if run["seed"] == sweep["parameters"]["seed"]["values"][0]:  # the others differ in a number alone
            settings = parse(stage, words)
            assert settings.study == path.stem and settings.tracking == "wandb"


@pytest.mark.parametrize("path", GRIDS, ids=name)
def test_a_study_asks_a_question_and_names_its_commands(path):
    question, command = path.read_text(encoding="utf-8").splitlines()[:2]
    assert question.startswith("# ") and question.endswith("?")
    assert f"make ablation-{path.stem} " in command and f"wandb sweep sweeps/{path.name}" in command
    study = SweepStage(study=str(path), output="out")
    trials = study.trials()
    assert study.question() == question[2:]
    assert {trial.seed for trial in trials} == {0, 1, 2}
    assert len({trial.folder for trial in trials}) == len(trials) == 3 * len({trial.label for trial in trials})


def drawn(parameters, end):
    """A run with every range at its `end`, min or max, and every list of values at its first or last."""
    listed = {"min": 0, "max": -1}[end]
    return {
        name: told["value"] if "value" in told else told["values"][listed] if "values" in told else told[end]
        for name, told in parameters.items()
    }


@pytest.mark.parametrize("path", DRAWN, ids=name)
def test_a_sweep_that_draws_its_runs_can_find_that_the_defaults_are_best(path):
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    stage, _ = arguments(sweep, {})
    default = parse(stage, [])
    varied = {key: told for key, told in sweep["parameters"].items() if "value" not in told}
    assert varied
    for key, told in varied.items():
        value = getattr(default, key)
        assert value in told["values"] if "values" in told else told["min"] <= value <= told["max"], key


@pytest.mark.parametrize("path", DRAWN, ids=name)
def test_two_agents_of_a_sweep_that_draws_its_runs_work_side_by_side(path):
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    one, other = (parse(*arguments(sweep, drawn(sweep["parameters"], end))) for end in ("min", "max"))
    assert one.folder != other.folder and not one.overwrite


def test_an_agent_and_a_local_sweep_put_a_run_into_one_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "sweeps" / "factors.yaml"
    sweep = read_sweep(str(path))
    agents = {parse(*arguments(sweep, run)).folder for run in expand(sweep)}
    assert agents == {trial.folder for trial in SweepStage(study=str(path)).trials()}


def test_the_rows_of_the_papers_table_5_stand_in_the_factors():
    trials = SweepStage(study=str(ROOT / "sweeps" / "factors.yaml"), seeds=1).trials()
    quoted = {trial.label: trial.quoted for trial in trials if trial.quoted}
    assert quoted == {
        "all four factors": 98.03, "without position": 82.39, "without sparsity": 92.15, "hidden states": 86.02,
        "hidden states and factors": 87.01, "static router": 97.63,
    }  # fmt: skip
    alone = [trial.factors for trial in trials if len(trial.factors) == 1]
    assert sorted(alone) == [("attention",), ("position",), ("rank",), ("sparsity",)]
    assert len({(trial.steps, trial.batch_size, trial.generations) for trial in trials}) == 1  # equal trainings


def test_wishes_replace_what_the_file_says_but_not_what_it_varies():
    kv = str(ROOT / "sweeps" / "kv.yaml")
    trials = SweepStage(study=kv, seeds=2, seed=5, budget=0.5, model="random:tiny").trials()
    assert {(trial.seed, trial.budget, trial.model) for trial in trials} == {(s, 0.5, "random:tiny") for s in (5, 6)}
    with pytest.raises(UserError, match="varies"):
        SweepStage(study=str(ROOT / "sweeps" / "budgets.yaml"), budget=0.5).trials()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "bayes"}, "method of .* is bayes"),
        ({"early_terminate": {"type": "hyperband"}}, "stops runs early"),
        ({"parameters": {"steps": {"min": 1, "max": 9}}}, "steps .* neither"),
        ({"parameters": {"steps": 3}}, "steps .* neither"),
        ({"parameters": None}, "no parameters"),
        ({"command": ["python", "prog.py", "${args}"]}, "command is not"),
        ({"command": ["${env}", "${interpreter}", "-m", "ftp_lightning", "trial", "${args_json}"]}, "args_json"),
        ({"command": ["${env}", "${interpreter}", "-m", "ftp_lightning", "train", "${args}"]}, "stage train"),
        ({"parameters": {"bugdet": {"value": 3}}}, "bugdet"),
        ({"parameters": {"allocation": {"value": "even"}}}, "no allocation 'even'"),
        ({"parameters": {"dense": {"value": 2}}}, "dense is given, but a run of a study finds its own"),
        ({"parameters": {"config": {"values": [{"label": "a"}, {"label": "a", "steps": 3}]}}}, "two runs are called a"),
        ({"parameters": {"config": {"values": [{"label": "a"}, {"label": "b"}]}}}, "a and b are one and the same run"),
    ],
)
def test_what_cannot_be_run_is_told_before_anything_is(tmp_path, change, said):
    sweep = yaml.safe_load((ROOT / "sweeps" / "choice.yaml").read_text(encoding="utf-8")) | change
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(sweep))
    with pytest.raises(UserError, match=said):
        SweepStage(study=str(tmp_path / "study.yaml"), output=str(tmp_path / "out")).execute()
    assert not (tmp_path / "out").exists()


def test_a_cap_holds():
    assert len(expand(read_sweep(str(GRIDS[0])) | {"run_cap": 2})) == 2


def test_make_runs_each_study_by_its_file():
    told = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "sweep --study sweeps/$*.yaml" in told
    command = "sweep --study sweeps/factors.yaml --seeds=3 --budget=0.4 --model=random:tiny"
    stage, *flags = shlex.split(command)
    assert stage in STAGES and parse(stage, flags).seeds == 3


@pytest.mark.slow
@pytest.mark.parametrize("path", GRIDS, ids=name)
def test_every_run_of_every_study_comes_to_its_end(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = with_values(read_sweep(str(path)), str(path), seed=[0], **TINY)
    small = {"steps": 2, "calibration_windows": 2, "generations": 1, "finetune_generations": 1}
    for run in expand(sweep):
        stage, words = arguments(sweep, run)
        given = parse(stage, words)
        least = {key: value for key, value in small.items() if getattr(given, key)}
        folder = parse(stage, [*words, *(f"--{key}={value}" for key, value in least.items())]).execute()
        assert (folder / "results.json").exists()


GRID = {"method": "grid", "parameters": {"seed": {"values": list(range(3000))}, "budget": {"values": [0.1] * 3000}}}


def test_a_grid_is_bounded_and_has_runs(tmp_path):
    with pytest.raises(UserError, match="9,000,000 runs"):
        expand(GRID)
    assert [run["seed"] for run in expand(GRID | {"run_cap": 2})] == [0, 1]
    (tmp_path / "none.yaml").write_text("method: grid\nparameters: {seed: {values: []}}")
    with pytest.raises(UserError, match="seed .* has no values"):
        read_sweep(str(tmp_path / "none.yaml"))
