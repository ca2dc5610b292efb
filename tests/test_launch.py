"""The same command under every launcher finds the same; who a process is comes from the launcher's own variables."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import script
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from ftp_lightning.errors import Interrupted, UserError
from ftp_lightning.launcher import Place, forget, launched, place

ROOT = Path(__file__).resolve().parent.parent
TINY = "--model random:tiny --device cpu --tracking none --prompt_tokens 96 --continuation_tokens 16".split()
SEARCH = ["search", *TINY, *"--windows 4 --stage_windows 2 --generations 2 --offspring 3 --batch_size 2".split()]
TRAIN = ["train", *TINY, *"--steps 4 --batch_size 1 --validations 2 --validation_windows 2 --budget 0.4".split()]
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "RANK": "4", "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
}  # fmt: skip
SRUN = {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NODELIST": "localhost", "SLURM_JOB_ID": "4242",
    "SLURM_NTASKS": "6", "MASTER_ADDR": "127.0.0.1",
}  # fmt: skip


@pytest.fixture
def env(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)

    def put(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    monkeypatch.setenv("MASTER_PORT", "15000")
    return put


@pytest.mark.parametrize("said", [TORCHRUN, SRUN])
def test_who_a_process_is(env, said):
    assert not launched()
    env(said)
    assert launched() and place() == Place(rank=4, count=6, local_rank=1, node=1, nodes=2)
    forget()
    assert not launched()


def test_one_process_and_a_batch_script_of_many_tasks_are_alone(env):
    env(TORCHRUN | {"WORLD_SIZE": "1"})
    assert not launched()
    forget()
    env({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"})
    assert not launched()


def test_unequal_nodes_are_refused(env):
    env(SRUN | {"SLURM_STEP_NUM_TASKS": "5"})
    with pytest.raises(UserError, match="5 tasks on 2 nodes"):
        place()


def test_interrupted_is_an_error_that_is_told():
    assert issubclass(Interrupted, UserError)


@pytest.mark.parametrize(
    ("failed", "status", "said"),
    [
        (2, 2, ""),
        (143, 143, ""),
        (-signal.SIGKILL, 137, "process 1 was ended by SIGKILL"),
        (signal.SIGTERM, 143, ""),
        (None, 0, ""),
    ],
)
def test_our_launcher_adds_no_traceback_to_a_refusal(monkeypatch, capsys, failed, status, said):
    together = script("experiments/together.py")

    def run(arguments):
        assert arguments.training_script == "ftp_lightning" and arguments.training_script_args == ["search", "-x"]
        if isinstance(failed, signal.Signals):
            raise SignalException("stopped", failed)
        if failed is not None:
            raise ChildFailedError("stage", {1: ProcessFailure(1, 4242, failed, "none")})

    monkeypatch.setattr(together, "run", run)
    assert together.main("2", "search", "-x") == status
    err = capsys.readouterr().err
    assert err.startswith(said) and len(err.splitlines()) == 2 * bool(said)


def run(*command, status=0, **env):
    done = subprocess.run(
        [str(word) for word in command], env=os.environ | {"OMP_NUM_THREADS": "1"} | env, capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def launch(kind, *arguments):
    """The stage in two processes; returns what they said."""
    script = ROOT / "experiments" / "launch.py"
    if kind == "torchrun":
        return run(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, script, *arguments)
    if kind == "fabric run":
        fabric = Path(sys.executable).with_name("fabric")
        return run(fabric, "run", "--accelerator", "cpu", "--devices", 2, "--", script, *arguments)
    ranks = []
    for rank in range(2):
        step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_NTASKS": "2"}
        env = os.environ | SRUN | step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "MASTER_PORT": "15321"}
        ranks.append(subprocess.Popen([sys.executable, script, *map(str, arguments)], env=env))
    assert [rank.wait() for rank in ranks] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchrun", "fabric run", "the variables of srun"])
def test_two_processes_of_a_launcher_find_what_one_finds(kind, tmp_path):
    for stage, alone, names in (
        (SEARCH, (), ("schedule.json", "metrics.json")),
        (TRAIN, ("--processes", 2), ("metrics.json", "pruned/pruner.json", "pruned/router.safetensors")),
    ):
        one, two = tmp_path / f"{stage[0]}1", tmp_path / f"{stage[0]}2"
        run(sys.executable, "-m", "ftp_lightning", *stage, *alone, "--output", one)
        launch(kind, *stage, "--output", two)
        for name in names:
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.slow
def test_a_stage_of_one_process_and_a_refusal_end_for_all(tmp_path):
    together = (sys.executable, ROOT / "experiments" / "together.py", 2)
    run(*together, "sensitivity", *TINY, "--windows", 2, "--output", tmp_path / "s")
    assert (tmp_path / "s" / "provenance.json").exists()
    refused = run(*together, *SEARCH, "--schedule", tmp_path / "missing", "--output", tmp_path / "n", status=2).stderr
    assert refused.count("there is no") == 1 and len(refused.splitlines()) <= 3 and not (tmp_path / "n").exists()
