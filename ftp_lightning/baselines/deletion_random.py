"""Prompt deletion: random tokens are left."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ftp_lightning.baselines.peer import Peer, even
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.routing import RandomRouter, Router
from ftp_lightning.routing.base import RoutingContext
from ftp_lightning.routing.random import uniform_hash
from ftp_lightning.schedule import Schedule


class OneDraw(RandomRouter):
    """Score = hash(seed, position), the same in every block. A p_compute, as that of `RandomRouter`."""

    def score(self, context: RoutingContext) -> Tensor:
        return uniform_hash(self.seed, 0, context.position)


class DeletionRandom(Peer):
    """Random tokens are cut out of the prompt before block 0, at original positions: the floor under every selector of
    prompt tokens. The first and the last token stay [ours]."""

    name, title, paper = "deletion_random", "prompt deletion, random", "the floor"
    seeded = own_schedule_only = True

    def tries(self, setting: Setting) -> Iterator[tuple[Router, Schedule]]:
        yield OneDraw(setting.seed), even(setting.blocks)
