"""A study on a tiny model: equal runs are one, finished ones are not done again, the table says what the runs say."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from wandb_log import read_run

from ftp_lightning import TokenPruner
from ftp_lightning.errors import UserError
from ftp_lightning.report.study import is_sure
from ftp_lightning.stages import inputs
from ftp_lightning.studies import runner
from ftp_lightning.studies import study_table as sweep_table
from ftp_lightning.studies.runner import is_finished, to_do
from ftp_lightning.studies.sweep import SweepStage

COMMAND = ["${env}", "${interpreter}", "-m", "ftp_lightning", "trial", "${args}"]
SIZES = {
    "model": "random:tiny", "device": "cpu", "prompt_tokens": 96, "continuation_tokens": 8, "steps": 2, "items": 3,
    "validation_windows": 2, "calibration_windows": 2, "generations": 1, "test_windows": 3,
}  # fmt: skip
ROWS = [{"label": "reference"}, {"label": "rank alone", "factors": ["rank"], "quoted": 90.5}]
STATIC = {"label": "static", "router": "static"}


def write_study(folder: Path, rows=ROWS, seeds=(0, 1), **more) -> str:
    values = {name: {"value": value} for name, value in (SIZES | more).items()}
    sweep = {
        "program": "ftp_lightning",
        "method": "grid",
        "metric": {"name": "kl", "goal": "minimize"},
        "command": COMMAND,
    }
    sweep["parameters"] = {**values, "seed": {"values": list(seeds)}, "config": {"values": rows}}
    (folder / "tiny.yaml").write_text("# Does it matter?\n" + yaml.safe_dump(sweep))
    return str(folder / "tiny.yaml")


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("provenance.json")}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study that is finished."""
    folder = tmp_path_factory.mktemp("study")
    loaded, load = [], inputs.models.load
    inputs.models.load = lambda *a, **k: loaded.append(a) or load(*a, **k)
    try:
        study = SweepStage(study=write_study(folder, [*ROWS, STATIC]), output=str(folder / "runs" / "tiny"))
        study.execute()
    finally:
        inputs.models.load = load
    return study, loaded


def test_a_study_leaves_table_figure_and_numbers(done):
    study, _ = done
    assert {path.name for path in study.folder.iterdir()} == {*sweep_table.PRODUCTS, "runs"}
    table = (study.folder / "table.md").read_text()
    assert table.startswith("Does it matter?\n")
    assert [line.split(" | ")[0] for line in table.splitlines()[4:7]] == ["| reference", "| rank alone", "| static"]
    assert "90.5" in table and "± is the standard deviation" in table
    found = json.loads((study.folder / "study.json").read_text())
    assert [(row["label"], row["seeds"], len(row["kl"])) for row in found["rows"]] == [
        (label, [0, 1], 2) for label in ("reference", "rank alone", "static")
    ]
    assert [row["parameters"] for row in found["rows"]] == [450, 258, 0]
    assert found["sentence"] in table
    assert (study.folder / "study.png").read_bytes().startswith(b"\x89PNG")
    assert len((study.folder / "study.csv").read_text().splitlines()) == 1 + 6


def test_of_two_parameters_rows_that_differ_in_the_last_alone_are_compared_too(tmp_path):
    more = {name: {"values": values} for name, values in (("kv", ["keep", "evict"]), ("router", ["dynamic", "static"]))}
    file = tmp_path / "two.yaml"
    sweep = yaml.safe_load(Path(write_study(tmp_path)).read_text())
    del sweep["parameters"]["config"]
    file.write_text("# Which?\n" + yaml.safe_dump(sweep | {"parameters": sweep["parameters"] | more}))
    assert SweepStage(study=str(file)).pairs() == [
        (f"kv {kv}, router static", f"kv {kv}, router dynamic") for kv in ("keep", "evict")
    ]
    assert SweepStage(study=write_study(tmp_path)).pairs() == []


def test_pairs_are_told_with_their_own_difference(done, tmp_path):
    study, _ = done
    trials = study.trials()
    sweep_table.write_study(tmp_path, "Which?", trials, [("static", "rank alone"), ("static", "not run")])
    found = json.loads((tmp_path / "study.json").read_text())
    pair, first = found["pairs"], {one["label"]: one for one in found["compared"]}
    assert [(one["label"], one["against"]) for one in pair] == [("static", "rank alone")]
    apart = first["static"]["kl"]["difference"] - first["rank alone"]["kl"]["difference"]
    assert pair[0]["kl"]["difference"] == pytest.approx(apart)
    assert "| static | rank alone | " in (tmp_path / "table.md").read_text()
    assert found["sentence"].startswith("Against the row that is alike but for the last parameter ")
    assert "pairs" not in json.loads((study.folder / "study.json").read_text())


def test_the_model_is_loaded_once_per_seed_of_a_random_one(done):
    assert len(done[1]) == 2


def test_the_schedule_is_found_once_per_seed_and_shared(done):
    study, _ = done
    shared = study.folder.parent / "shared"
    kinds = [path.name.split("-")[0] for path in shared.iterdir() if path.is_dir()]
    assert sorted(kinds) == ["search"] * 2 + ["sensitivity"] * 2 + ["train"] * 4
    by_seed = {}
    for trial in study.trials():
        results = json.loads((trial.folder / "results.json").read_text())
        by_seed.setdefault(trial.seed, set()).add(tuple(results["schedule"]))
    assert [len(schedules) for schedules in by_seed.values()] == [1, 1]


def test_runs_of_one_seed_are_measured_on_the_same_items_and_give_usable_pruners(done):
    study, _ = done
    found = {}
    for trial in study.trials():
        results = json.loads((trial.folder / "results.json").read_text())
        assert len(results["kl_rows"]) == 3 and len(results["right"]) == len(results["need"]) == 3
        assert results["kl"] == pytest.approx(sum(results["kl_rows"]) / 3)
        found.setdefault(trial.seed, []).append(results["need"])
        assert TokenPruner.load(trial.folder / "pruned").schedule.budget == pytest.approx(0.3, abs=1e-9)
    assert all(needs == needs[:1] * 3 for needs in found.values())


def test_a_second_call_has_nothing_to_do_and_says_so(done, capfd):
    study, _ = done
    before = stamps(study.folder.parent)
    study.execute()
    assert "nothing to do" in capfd.readouterr().err
    assert stamps(study.folder.parent) == before


def test_what_is_broken_goes_on_and_nothing_else_is_touched(done):
    study, _ = done
    before, lost = stamps(study.folder.parent), study.trials()[-1].folder
    kept = (lost / "results.json").read_bytes()
    (lost / "provenance.json").unlink()
    study.execute()
    after = stamps(study.folder.parent)
    assert {path for path in after if after[path] != before[path]} == {str(lost / "provenance.json")}
    assert (lost / "results.json").read_bytes() == kept


def test_runs_of_other_code_are_refused_and_overwrite_makes_those_alone_again(done):
    study, _ = done
    trials = study.trials()
    path = trials[0].folder / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "0" * 16}))
    before = stamps(study.folder)
    with pytest.raises(UserError, match="other code"):
        study.execute()
    replace(study, overwrite=True).execute()
    after = stamps(study.folder)
    assert {changed for changed in after if after[changed] != before[changed]} == {str(path)}
    assert all(is_finished(trial) for trial in trials) and to_do(trials) == []


@pytest.mark.parametrize(("count", "said"), [(1, "/a holds a run of"), (2, "/a and 1 more hold runs of")])
def test_the_sentence_about_runs_of_other_code_counts_them(monkeypatch, count, said):
    monkeypatch.setattr(runner, "is_finished", lambda trial: False)
    runs = [SimpleNamespace(folder=f"/{name}", overwrite=False) for name in "ab"[:count]]
    with pytest.raises(UserError, match=f"^{said} other inputs or of other code"):
        to_do(runs)


def test_a_run_that_is_refused_does_not_stop_the_others(tmp_path, capfd):
    rows = [{"label": "good", "router": "static"}, {"label": "bad", "factors": ["posture"]}]
    study = SweepStage(study=write_study(tmp_path, rows, seeds=[0]), output=str(tmp_path / "tiny"))
    with pytest.raises(UserError, match="1 of 2 runs .*bad.*factors"):
        study.execute()
    found = json.loads((study.folder / "study.json").read_text())
    assert [row["label"] for row in found["rows"]] == ["good"]


# ---------------------------------------------------------------- what the table says


def result(kl, right, need=(True,) * 40):
    rows = [kl + 0.001 * (i % 3) for i in range(20)]
    share = sum(r for r, n in zip(right, need) if n) / sum(need)
    kept = {"share": share, "items": sum(need)}
    more = {"realised_sparsity": 0.3, "flops_reduction": 0.27, "parameters": 450}
    return {"kl": kl, "kl_rows": rows, "kept": kept, "right": list(right), "need": list(need), **more}


class Trial:
    def __init__(self, seed, quoted=None):
        self.seed, self.quoted = seed, quoted


def group(*results, quoted=None):
    return [(Trial(seed, quoted), found) for seed, found in enumerate(results)]


GOOD, BAD = [True] * 40, [True] * 20 + [False] * 20


def test_differences_are_paired_item_by_item_on_the_seeds_that_both_have():
    reference = group(result(0.1, GOOD), result(0.2, GOOD), result(9.0, GOOD))
    found = sweep_table.compare("x", group(result(0.15, BAD), result(0.25, BAD)), reference)
    assert found["kl"] == {key: pytest.approx(0.05) for key in ("difference", "low", "high")} | {
        "by_seed": pytest.approx([0.05, 0.05])
    }
    assert found["kept"]["difference"] == pytest.approx(-50) and found["kept"]["high"] < 0
    assert found["kept"]["by_seed"] == [-50, -50]


def test_what_trainings_vary_is_in_the_interval():
    """One training of three is 50 points worse, two are level: pooled questions would call that a difference."""
    reference = group(*[result(0.1, GOOD)] * 3)
    found = sweep_table.compare("x", group(result(0.3, BAD), result(0.1, GOOD), result(0.1, GOOD)), reference)
    assert found["kept"]["low"] < -60 and found["kept"]["high"] > 20
    assert not is_sure(found["kept"]) and not is_sure(found["kl"])


def test_seeds_that_disagree_are_no_difference_whatever_the_interval():
    found = {"difference": 1.0, "low": 0.2, "high": 1.8}
    assert is_sure(found) and is_sure(found | {"by_seed": [0.5, 1.5]})
    assert not is_sure(found | {"by_seed": [-0.1, 1.0, 1.0, 1.0]})


def test_documents_that_all_seeds_read_add_to_what_seeds_vary():
    """Losses in one of two documents, the same under each seed: with documents of their own the seeds would agree."""
    documents = {"documents": {"right": [0] * 20 + [1] * 20, "kl_rows": [0, 1] * 10}}
    reference = group(*[result(0.1, GOOD)] * 3)
    found = sweep_table.compare("x", group(*[result(0.2, BAD) | documents] * 3), reference)
    alone = sweep_table.compare("x", group(*[result(0.2, BAD)] * 3), reference)
    assert alone["kept"]["high"] < 0 < found["kept"]["high"]


def test_answers_that_do_not_need_the_passage_do_not_count():
    need = [True] * 20 + [False] * 20
    found = sweep_table.compare("x", group(result(0.1, BAD, need)), group(result(0.1, GOOD, need)))
    assert found["kept"]["difference"] == 0 and found["kept"]["low"] == -found["kept"]["high"] < 0
    one = [True] + [False] * 39
    assert sweep_table.compare("x", group(result(0.1, BAD, one)), group(result(0.1, GOOD, one)))["kept"]["low"] is None


def test_the_sentence_names_what_changed_by_more_than_its_interval_and_nothing_else():
    worse = {"label": "worse", "kl": {"difference": 0.05, "low": 0.04, "high": 0.06}, "kept": None}
    same = {"label": "same", "kl": {"difference": 0.05, "low": -0.01, "high": 0.11}, "kept": None}
    said = sweep_table.sentence("all", [worse, same])
    assert "worse: KL +0.05" in said and "same" not in said
    assert "nothing changed" in sweep_table.sentence("all", [same])


def test_rows_hold_mean_and_spread_over_seeds():
    row = sweep_table.summary("x", group(result(0.1, GOOD), result(0.3, BAD), quoted=82.39))
    assert (row["kl"], row["kept"], row["answers"], row["quoted"]) == ([0.1, 0.3], [1.0, 0.5], 80, 82.39)
    assert sweep_table.mean_std(row["kl"]) == "0.200 ± 0.14"
    assert sweep_table.mean_std([None]) == "–"


# ---------------------------------------------------------------- processes


def command(study: str, output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "ftp_lightning", "sweep", "--study", study, "--output", str(output), *more]


def hears_ctrl_c() -> None:
    """What a shell starts in the background does not hear it, and neither does what that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def results_of(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.glob("runs/*/results.json")}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_study_loses_the_run_in_progress_and_ends_the_same(done, tmp_path, number):
    study, _ = done
    output = tmp_path / "runs" / "tiny"
    process = subprocess.Popen(
        command(study.study, output), stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hears_ctrl_c
    )
    for line in process.stderr:
        if "3 of 6 runs" in line:
            os.killpg(process.pid, number)
            break
    said = process.stderr.read()
    assert process.wait() == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert number == signal.SIGKILL or "the same command goes on" in said
    kept = {path for path in stamps(output)}
    before = stamps(output)
    assert 3 <= len(kept) < 6
    subprocess.run(command(study.study, output), check=True, capture_output=True)
    assert {path: stamp for path, stamp in stamps(output).items() if path in kept} == before
    assert results_of(output) == results_of(study.folder)
    assert (output / "table.md").read_bytes() == (study.folder / "table.md").read_bytes()


@pytest.mark.slow
def test_several_processes_find_what_one_finds(done, tmp_path):
    study, _ = done
    output = tmp_path / "runs" / "tiny"
    subprocess.run(command(study.study, output, "--jobs=2"), check=True, capture_output=True)
    assert results_of(output) == results_of(study.folder)


@pytest.mark.slow
def test_workers_leave_when_their_parent_is_killed(done, tmp_path):
    study, _ = done
    output = tmp_path / "runs" / "tiny"
    process = subprocess.Popen(
        command(study.study, output, "--jobs=2"), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in process.stderr:
        if "1 of 6 runs" in line:
            process.kill()  # the parent alone
            break
    process.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and group_lives(process.pid):
        time.sleep(0.2)
    assert not group_lives(process.pid)


def group_lives(group_id: int) -> bool:
    try:
        os.killpg(group_id, 0)
    except ProcessLookupError:
        return False
    return True


AGENT = """
import multiprocessing, os, sys, yaml
import wandb
from wandb import wandb_agent
import wandb.apis.public.sweeps as server
from ftp_lightning.studies.sweep_file import expand, read_sweep

sweep = read_sweep(sys.argv[1])
left = [(f"run{i}", run) for i, run in enumerate(expand(sweep))]

def heartbeat(api, agent_id, metrics, run_states):
    if run_states:
        return []
    if not left:
        return [{"type": "exit", "id": "end"}]
    name, run = left.pop(0)
    args = {key: {"value": value} for key, value in run.items()}
    return [{"type": "run", "id": name, "run_id": name, "program": sweep["program"], "args": args}]

server._sweep_with_runs = lambda api, sweep_id, specs: {"config": yaml.safe_dump(sweep)}
server._register_agent = lambda api, host, sweep_id=None: {"id": "agent"}
server._agent_heartbeat = heartbeat
wandb_agent.Agent.POLL_INTERVAL = 0.05
os.environ["WANDB_SWEEP_ID"] = "local"
class Api: pass
wandb.Api = lambda *a, **k: Api()
wandb_agent.Agent(Api(), multiprocessing.Queue(), sweep_id="local").run()
"""


@pytest.mark.slow
def test_the_real_agent_loop_runs_a_study_and_a_sweep_finds_it_done(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = write_study(tmp_path, [ROWS[1]], seeds=[0, 1], study="tiny", tracking="wandb")
    (tmp_path / "agent.py").write_text(AGENT)
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # the agent runs `python`
    subprocess.run([sys.executable, "agent.py", path], check=True, env=environment, capture_output=True)
    study = SweepStage(study=path)
    assert to_do(study.trials()) == []
    runs = [read_run(trial.folder) for trial in study.trials()]
    assert [(run["id"], run["sweep"], run["group"], run["job_type"]) for run in runs] == [
        (f"run{i}", "local", "tiny", "trial") for i in range(2)
    ]
    assert all(run["config"]["budget"] == 0.3 and run["exit"] == 0 for run in runs)
    assert all(any("kl" in row for row in run["history"]) for run in runs)
    capfd.readouterr()
    study.execute()
    assert "nothing to do" in capfd.readouterr().err
