"""Many processes, one piece of work: each does a share, all know all results, and a drift between them is an error."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ftp_lightning.errors import UserError

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class Processes:
    """The processes of a Lightning Fabric that walk through the same work in step; without one, this process alone.

    Every rank calls the same methods in the same order. Python objects travel by gloo or NCCL.
    """

    def __init__(self, fabric: Fabric | None = None):
        self.fabric = fabric
        self.rank, self.count = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """[function(item) for item in items], item i computed by rank i mod count; every rank gets the whole list.

        An error on one rank is raised on all, so that none waits for ever.
        """
        items = list(items)
        if self.count == 1:
            return [function(item) for item in items]
        shares = self.gather(_caught(function, items[self.rank :: self.count]))
        for rank, (_, error) in enumerate(shares):
            if error is not None:
                kind, text = error
                raise UserError(text) if kind == "user" else RuntimeError(f"process {rank} failed:\n{text}")
        return [shares[place % self.count][0][place // self.count] for place in range(len(items))]

    def check_equal(self, what: str, value: Any) -> None:
        """UserError on every rank where `value` is not the same on all."""
        if self.count == 1:
            return
        found = self.gather(value)
        other = next((rank for rank, theirs in enumerate(found) if theirs != found[0]), None)
        if other is not None:
            raise UserError(
                f"{what} of process {other} is {_short(found[other])}, that of process 0 {_short(found[0])}\n"
                "All processes need the same model, data, settings and software."
            )

    def from_first(self, value: Any) -> Any:
        """What rank 0 gives."""
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        """One value per rank, on every rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found


def launch(count: int, device: torch.device, function: Callable, *arguments: Any) -> Any:
    """function(processes, device, *arguments) in `count` new processes of this machine; returns what rank 0 returns.

    On CUDA rank r has device r; on a CPU the cores are shared out, at least one thread each. UserError for more
    processes than GPUs.
    """
    from lightning.fabric import Fabric

    accelerator = "cuda" if device.type == "cuda" else "cpu"
    if accelerator == "cuda" and count > torch.cuda.device_count():
        raise UserError(f"{count} processes were asked for, there are {torch.cuda.device_count()} GPUs")
    fabric = Fabric(accelerator=accelerator, devices=count, strategy="ddp_spawn")
    threads = max(1, torch.get_num_threads() // count)
    answer, error = pickle.loads(fabric.launch(_run, threads, pickle.dumps((function, arguments))))
    if error is not None:
        raise UserError(error)
    return answer


def run_in(count: int, device: torch.device, function: Callable, *arguments: Any) -> Any:
    """`launch`, but that one process is this one."""
    if count == 1:
        return function(Processes(), device, *arguments)
    return launch(count, device, function, *arguments)


def _run(fabric: Fabric, threads: int, job: bytes) -> bytes:
    """Pickled (answer, error) of a pickled (function, arguments): Lightning searches both for tensors, and takes no
    frozen dataclass. A UserError goes home as text: a process that dies of it leaves a trace that nobody can read."""
    torch.set_num_threads(threads)
    function, arguments = pickle.loads(job)
    try:
        return pickle.dumps((function(Processes(fabric), fabric.device, *arguments), None))
    except UserError as error:
        return pickle.dumps((None, str(error)))


def _caught(function: Callable, items: Sequence[Any]) -> tuple[list[Any], tuple[str, str] | None]:
    try:
        return [function(item) for item in items], None
    except UserError as error:
        return [], ("user", str(error))
    except Exception:
        return [], ("other", traceback.format_exc())


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
