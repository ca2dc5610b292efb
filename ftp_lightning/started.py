"""Processes that are there already, as Lightning is told of them."""

from __future__ import annotations

from lightning.fabric.plugins.environments import LightningEnvironment

from ftp_lightning.launcher import Place


class Started(LightningEnvironment):
    """Who this process is among them; where the first is to be found stands in MASTER_ADDR and MASTER_PORT."""

    creates_processes_externally = True

    def __init__(self, place: Place):
        super().__init__()
        self.place = place
        self._global_rank, self._world_size = place.rank, place.count

    def local_rank(self) -> int:
        return self.place.local_rank

    def node_rank(self) -> int:
        return self.place.node
