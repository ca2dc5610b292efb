"""lm-eval in several processes: each scores every N-th item, the first gathers all.

HFLM takes part only where it made the model itself, and by a rank that is wrong on a second node. Here torch's process
group says who we are: ours (`evaluate --processes`), that of `accelerate launch`, or one that is opened where torchrun
or SLURM has left its variables.
"""

from __future__ import annotations

import os

import torch
import torch.distributed


class Ranked:
    """What lm-eval asks of a model about the other processes; to be mixed in before HFLM, which knows these."""

    device: torch.device
    rank: int
    world_size: int

    def _join(self) -> None:
        """Find our place among the processes, if there are several."""
        group = torch.distributed
        if group.is_available() and not group.is_initialized() and _announced():
            group.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if group.is_available() and group.is_initialized():
            self._rank, self._world_size = group.get_rank(), group.get_world_size()
        else:
            self._rank, self._world_size = 0, 1

    def all_gather(self, tensor):
        """The tensors of all ranks, flat, one after the other."""
        if self.world_size == 1:
            return tensor
        flat = tensor.reshape(-1)
        found = [torch.empty_like(flat) for _ in range(self.world_size)]
        torch.distributed.all_gather(found, flat)
        return torch.cat(found)

    def gather_object(self, obj, dst: int = 0):
        """One object per rank on rank `dst`, None elsewhere."""
        if self.world_size == 1:
            return [obj]
        found = [None] * self.world_size
        torch.distributed.all_gather_object(found, obj)
        return found if self.rank == dst else None

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier()


def _announced() -> bool:
    """Whether a launcher has told this process of others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
