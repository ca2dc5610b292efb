"""Many processes, one piece of work: each does a share, all know all results, and a drift between them is an error.

They are started here (`--processes N`, on this machine), or by torchrun, `fabric run` or srun (`launcher`).
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftp_lightning import launcher
from ftp_lightning.errors import Interrupted, UserError, file_error
from ftp_lightning.stopping import await_workers, end_with_parent, stop_workers

if TYPE_CHECKING:
    from lightning.fabric import Fabric

KINDS = {"user": UserError, "interrupted": Interrupted}
for _name in ("fabric.utilities.distributed", "fabric.utilities.rank_zero", "pytorch.utilities.rank_zero"):
    logging.getLogger(f"lightning.{_name}").setLevel(logging.WARNING)  # here: a new process imports this first of all


class Processes:
    """The processes of a Lightning Fabric that walk through the same work in step; without one, this process alone.

    Every rank calls the same methods in the same order. Python objects travel by gloo or NCCL.
    """

    def __init__(self, fabric: Fabric | None = None):
        self.fabric = fabric
        self.rank: int = 0 if fabric is None else fabric.global_rank
        self.count: int = 1 if fabric is None else fabric.world_size

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
                raise KINDS[kind](text) if kind in KINDS else RuntimeError(f"process {rank} failed:\n{text}")
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
    processes than GPUs, and what any of them raises; Interrupted where one of them was killed.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import LightningEnvironment

    accelerator = "cuda" if device.type == "cuda" else "cpu"
    if accelerator == "cuda" and count > torch.cuda.device_count():
        raise UserError(f"{count} processes were asked for, there are {torch.cuda.device_count()} GPUs")
    here = LightningEnvironment()  # also inside of a SLURM job
    fabric = Fabric(accelerator=accelerator, devices=count, strategy="ddp_spawn", plugins=[here])
    threads = max(1, torch.get_num_threads() // count)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # we tell how one of them ended
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of the new ones: DDP's advice on speed
    with tempfile.TemporaryDirectory() as notes:
        try:
            return pickle.loads(fabric.launch(_run, threads, notes, pickle.dumps((function, arguments))))
        except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
            raise _told(Path(notes), error) from error
        except BaseException:  # this process alone was stopped
            stop_workers()
            await_workers()
            raise


def run_in(count: int, device: torch.device, function: Callable, *arguments: Any) -> Any:
    """`launch`, but that one process is this one, and that processes which a launcher has started are taken."""
    if count == 1:
        return function(Processes(), device, *arguments)
    if _TOGETHER:
        there = _TOGETHER[0].processes.count
        if count != there:
            raise UserError(f"{count} processes were asked for, {there} were started\nLeave --processes out.")
        return _TOGETHER[0].lead(function, *arguments)
    return launch(count, device, function, *arguments)


def _run(fabric: Fabric, threads: int, notes: str, job: bytes) -> bytes:
    """The pickled answer of a pickled (function, arguments): Lightning searches both for tensors, and takes no frozen
    dataclass. What the user can mend is noted: a process that dies of it leaves a trace that nobody can read."""
    end_with_parent()
    torch.set_num_threads(threads)
    function, arguments = pickle.loads(job)
    try:
        return pickle.dumps(function(Processes(fabric), fabric.device, *arguments))
    except (UserError, OSError) as error:
        known = file_error(error) or error
        if isinstance(known, UserError):
            _note(Path(notes), fabric.global_rank, known)
        raise


def _note(notes: Path, rank: int, error: UserError) -> None:
    text = json.dumps([_kind(error), str(error)])
    (notes / f"{rank:06}").write_text(text, encoding="utf-8")


def _told(notes: Path, error: Exception) -> Exception:
    """What to say of processes that did not end well: what the first of them noted, or how one was killed."""
    noted = sorted(path for path in notes.iterdir() if path.name.isdigit())
    if noted:
        kind, text = json.loads(noted[0].read_text(encoding="utf-8"))
        return KINDS[kind](text)
    name = getattr(error, "signal_name", None)
    if name is None:
        return RuntimeError(str(error))
    cause = "often out of memory" if name == signal.SIGKILL.name else "by somebody else"
    place = getattr(error, "error_index", "?")
    return Interrupted(f"process {place} was ended by {name} ({cause})\nThe same command goes on.")


# ---------------------------------------------------------------- processes that a launcher has started

_TOGETHER: list[Together] = []
"""At most one: what `together` has found."""
_PATIENCE_DAYS = 7


class Together:
    """Processes that were started together: the first leads, the others help whenever it has work for all.

    While it works alone they wait, without a limit that would matter: on a channel of their own, by gloo. `busy`: in
    the middle of what all do.
    """

    def __init__(self, fabric: Fabric):
        from datetime import timedelta

        self.processes, self.device = Processes(fabric), fabric.device
        waiting = {"backend": "gloo", "timeout": timedelta(days=_PATIENCE_DAYS)}
        self.channel, self.busy = torch.distributed.new_group(**waiting), False

    def lead(self, function: Callable, *arguments: Any) -> Any:
        """function(processes, device, *arguments) in all processes; returns what the first returns."""
        self._say((function, arguments))
        return self._do(function, arguments)

    def help(self) -> None:
        """Of every process but the first: do what it says until it has nothing more."""
        while (job := self._say(None)) is not None:
            self._do(*job)
        self._part()

    def dismiss(self) -> None:
        """The first has nothing more to do."""
        self._say(None)
        self._part()

    def _part(self) -> None:
        """All leave the group together: an interpreter that ends while gloo's threads are at work is aborted."""
        torch.distributed.barrier(group=self.channel)
        torch.distributed.destroy_process_group()

    def _do(self, function: Callable, arguments: Sequence[Any]) -> Any:
        """With this process's share of the cores: while the first works alone it may use all of them."""
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, min(threads, (os.cpu_count() or 1) // self.processes.count)))
        self.busy = True
        answer = function(self.processes, self.device, *arguments)
        self.busy = False
        torch.set_num_threads(threads)
        return answer

    def _say(self, job: Any) -> Any:
        """What the first process says; frozen dataclasses travel as they are, pickled."""
        said: list[Any] = [pickle.dumps(job) if self.processes.rank == 0 else None]
        torch.distributed.broadcast_object_list(said, src=0, group=self.channel)
        return pickle.loads(said[0])


def together(device: torch.device) -> Together:
    """The processes that a launcher has started; call it once in each of them, where they are `launcher.launched`."""
    from lightning.fabric import Fabric

    from ftp_lightning.started import Started

    place = launcher.place()
    for name in [name for name in os.environ if name.startswith("LT_")]:
        del os.environ[name]  # of `fabric run`, under which Fabric would launch nothing
    about = {"devices": place.count // place.nodes, "num_nodes": place.nodes, "plugins": [Started(place)]}
    fabric = Fabric(accelerator="cuda" if device.type == "cuda" else "cpu", strategy="ddp", **about)
    fabric.launch()
    launcher.forget()
    _TOGETHER.append(Together(fabric))
    return _TOGETHER[0]


def _caught(function: Callable, items: Sequence[Any]) -> tuple[list[Any], tuple[str, str] | None]:
    try:
        return [function(item) for item in items], None
    except UserError as error:
        return [], (_kind(error), str(error))
    except Exception as error:
        known = file_error(error)
        return [], ("other", traceback.format_exc()) if known is None else (_kind(known), str(known))


def _kind(error: UserError) -> str:
    return "interrupted" if isinstance(error, Interrupted) else "user"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
