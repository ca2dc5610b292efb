"""What torchrun, `fabric run` and srun say in the environment of the processes they start."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ftp_lightning.errors import UserError

_THEIRS = ("LT_", "TORCHELASTIC_", "SLURM_")
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK")


def launched() -> bool:
    """Whether one of them has started this process as one of several. A batch script's own process, which SLURM also
    tells of tasks, is none: srun has not started it."""
    elastic = _is_elastic() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    return elastic or ("SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1)


@dataclass(frozen=True)
class Place:
    """Who a process is: its number among `count`, its number on its node, its node among `nodes`."""

    rank: int
    count: int
    local_rank: int
    node: int
    nodes: int


def place() -> Place:
    """Where this process stands; MASTER_ADDR and MASTER_PORT are set for SLURM, which has none. The step counts and not
    the job, which may have more tasks. UserError where the nodes have unequal numbers."""
    number = {name: int(value) for name, value in os.environ.items() if value.isdigit()}
    if _is_elastic():
        nodes = number["WORLD_SIZE"] // number["LOCAL_WORLD_SIZE"]
        return Place(number["RANK"], number["WORLD_SIZE"], number["LOCAL_RANK"], number["GROUP_RANK"], nodes)
    tasks, nodes = number["SLURM_STEP_NUM_TASKS"], number["SLURM_STEP_NUM_NODES"]
    if tasks % nodes:
        raise UserError(f"srun started {tasks} tasks on {nodes} nodes\nGive --ntasks-per-node, equal on all.")
    from lightning.fabric.plugins.environments import SLURMEnvironment

    os.environ["SLURM_NTASKS_PER_NODE"] = str(tasks // nodes)  # Lightning wants it said, however many ways there are
    job = SLURMEnvironment(auto_requeue=False)
    os.environ |= {"MASTER_ADDR": job.main_address, "MASTER_PORT": str(job.main_port)}
    return Place(number["SLURM_PROCID"], tasks, number["SLURM_LOCALID"], number["SLURM_NODEID"], nodes)


def forget() -> None:
    """Take it all away: the processes are in touch, and no library in here shall believe to be one of many."""
    for name in [name for name in os.environ if name.startswith(_THEIRS) or name in _NAMES]:
        del os.environ[name]


def _is_elastic() -> bool:
    """torchrun, and `fabric run`, which is a torchrun that speaks of itself too."""
    return "TORCHELASTIC_RUN_ID" in os.environ
