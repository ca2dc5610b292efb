"""On a real SLURM of two nodes: the batch files as they are, interrupted and put back into the queue, find what one
machine finds without interruption. `make slurm-test`."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
ROOT = Path(__file__).resolve().parent.parent
TINY = "--model random:tiny --device cpu --tracking none --prompt_tokens 96 --continuation_tokens 16".split()
SEARCH = "--windows 4 --stage_windows 2 --generations 40 --offspring 4 --survivors 2 --batch_size 2".split()
TRAIN = "--steps 40 --batch_size 1 --validations 8 --validation_windows 2 --budget 0.4".split()
EVALUATE = "--tasks story_name --limit 3 --windows 2 --batch_size 2".split()
SMALL = "--gpus-per-node=0 --cpus-per-task=1".split()


def missing():
    """Why there is no SLURM here; None where there is one."""
    programs = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
    if programs:
        return f"no {', '.join(programs)} here: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "starting slurmctld and munged needs root"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a user of a cluster that is up."""
    if missing():
        pytest.skip(missing())
    folder, script = tmp_path_factory.mktemp("slurm"), str(ROOT / "tests" / "slurm" / "cluster.sh")
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run([script, "up", str(folder), "2"], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        yield env
    finally:
        subprocess.run([script, "down", str(folder)], env=env, check=False)


def call(env, *command):
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def submit(env, log, name, *arguments, nodes=2, more=()):
    options = ["--parsable", f"--nodes={nodes}", "--ntasks-per-node=1", f"--output={log}", *SMALL, *more]
    return call(env, "sbatch", *options, f"experiments/slurm/{name}.sbatch", *map(str, arguments))


def state(env, job):
    return call(env, "scontrol", "show", "job", job).split("JobState=")[1].split()[0]


def wait_for(env, job, log, condition, seconds=900):
    """Until `condition()`; a job that is gone wrong, or time that has run out, fails with its log."""
    until = time.monotonic() + seconds
    while not condition():
        gone = state(env, job) in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        text = log.read_text() if log.exists() else ""
        assert not gone and time.monotonic() < until, f"{state(env, job)}\n{text}"
        time.sleep(0.3)


def finish(env, job, log):
    wait_for(env, job, log, lambda: state(env, job) == "COMPLETED")


def interrupted(env, job, log, saved):
    """SIGUSR1 as before a time limit, once something is saved; then the job's second start."""
    wait_for(env, job, log, saved.exists)
    call(env, "scancel", "--signal=USR1", job)
    wait_for(env, job, log, lambda: "back into the queue" in log.read_text())
    wait_for(env, job, log, lambda: state(env, job) == "PENDING")
    call(env, "scontrol", "update", f"jobid={job}", "StartTime=now")
    finish(env, job, log)
    assert "Restarts=1" in call(env, "scontrol", "show", "job", job)


def python(env, *arguments):
    call(env, sys.executable, "-m", "ftp_lightning", *map(str, arguments))


def same(one, other, *names):
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_search_train_and_evaluate_are_interrupted_and_find_what_one_machine_finds(slurm, tmp_path):
    base, log = tmp_path, tmp_path / "log"
    job = submit(slurm, log, "search", *TINY, *SEARCH, "--output", base / "search")
    interrupted(slurm, job, log, base / "search" / "state.json")
    python(slurm, "search", *TINY, *SEARCH, "--output", base / "search1")
    same(base / "search", base / "search1", "schedule.json", "metrics.json")

    log = tmp_path / "log2"
    job = submit(slurm, log, "train", *TINY, *TRAIN, "--output", base / "train")
    interrupted(slurm, job, log, base / "train" / "checkpoints" / "last.ckpt")
    python(slurm, "train", *TINY, *TRAIN, "--processes", 2, "--output", base / "train1")
    same(base / "train", base / "train1", "pruned/router.safetensors", "pruned/pruner.json", "metrics.json")

    log = tmp_path / "log3"
    evaluate = ["--pruned", base / "train" / "pruned", *TINY, *EVALUATE]
    finish(slurm, submit(slurm, log, "evaluate", *evaluate, "--output", base / "evaluate", nodes=1), log)
    python(slurm, "evaluate", *evaluate, "--output", base / "evaluate1")
    same(base / "evaluate", base / "evaluate1", "results.json", "record.jsonl")


def test_a_study_is_accepted_as_arrays_with_dependencies(slurm, tmp_path):
    env = slurm | {
        "RUNS": str(tmp_path),
        "BUDGETS": "0.2 0.4",
        "SBATCH": f"--hold --output={tmp_path}/%A_%a {' '.join(SMALL)}",
    }
    told = call(env, "experiments/slurm/study.sh", *TINY)
    jobs = [line.split()[-1] for line in told.splitlines()]
    assert [line.split(":")[0] for line in told.splitlines()] == ["search", "train", "finetune", "evaluate"]
    for before, job in zip(jobs, jobs[1:]):
        about = call(env, "scontrol", "show", "job", job)
        assert f"Dependency=aftercorr:{before}_*" in about and "ArrayTaskId=0-1" in about
    call(env, "scancel", *jobs)
    agents = env | {"SWEEP": "a/b/c"}
    call(agents, "sbatch", "--test-only", "--array", "1-2", *SMALL, "experiments/slurm/agents.sbatch")
