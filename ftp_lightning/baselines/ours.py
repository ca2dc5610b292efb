"""The method of this package among its peers: the static router, and a trained one, under a searched schedule."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ftp_lightning.baselines.peer import Peer
from ftp_lightning.baselines.setting import Profile, Setting
from ftp_lightning.costs.budget import OutOfReach
from ftp_lightning.costs.request import planned_cut
from ftp_lightning.errors import UserError
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import DynamicRouter, Router, StaticRouter
from ftp_lightning.schedule import Schedule


class FtpStatic(Peer):
    """FTP's static router (arXiv 2412.11494) under the searched schedule, keys and values kept [ours]."""

    name, title, paper = "ftp_static", "FTP, static router, searched", "FTP, arXiv 2412.11494"
    kv = "keep"

    def tries(self, setting: Setting) -> Iterator[tuple[Router, Schedule]]:
        if setting.searched is None:
            raise UserError(f"{self.name} needs a searched schedule.\nGive one, or search it.")
        yield self.router(setting), setting.searched

    def router(self, setting: Setting) -> Router:
        return StaticRouter()


class Ftp(FtpStatic):
    """FTP's trained router of 450 parameters under the searched schedule, keys and values kept [ours]."""

    name, title = "ftp", "FTP, trained router, searched"
    trained = seeded = True

    def router(self, setting: Setting) -> Router:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            return DynamicRouter()


class FtpProjected(Peer):
    """Routers that also see directions of the hidden state, each with the schedule searched with it (docs/routers.md).

    They were trained before, for a few budgets: at a cut the one is taken whose own cut is nearest and whose schedule,
    scaled by one factor as every form is, reaches it. Not among `PEERS`: it is nothing without its folders.

    Args:
        folder: holds `kv-budget-seed-projected/pruned`, as experiments/routers.py leaves them.
        least: a block whose sparsity was found to be below it stays dense, and the others are scaled up: a few tokens
            less are hardly worth the gathering.

    Attributes:
        taken: the name of the folder that the last pruner came from.
    """

    name, title, paper = "ftp_projected", "FTP, projected router, searched with it", "ours, after FTP, arXiv 2412.11494"
    kv, seeded, own_schedule_only = "keep", True, True

    def __init__(self, folder: str | Path | None = None, least: float = 0.0):
        self.folder, self.least = None if folder is None else Path(folder), least
        self.taken: str | None = None

    def known(self, seed: int, kv: str) -> dict[str, TokenPruner]:
        """The trained pruners of this seed by their folders' names; UserError where there is none."""
        place = f"{kv}-*-{seed}-projected/pruned"
        folders = [] if self.folder is None else sorted(self.folder.glob(place))
        if not folders:
            raise UserError(f"{self.folder} has no {place}.\nTrain them with experiments/routers.py, or leave it out.")
        return {folder.parent.name: TokenPruner.load(folder) for folder in folders}

    def placed(
        self, setting: Setting, cut: float, profile: Profile, form: Schedule | None, kv: str | None
    ) -> TokenPruner:
        known = self.known(setting.seed, kv or self.kv)
        about = (profile.prompt_tokens, profile.new_tokens)
        off = {name: abs(planned_cut(setting.model, one, *about) - cut) for name, one in known.items()}
        for name in sorted(known, key=off.__getitem__):
            pruner, self.taken = known[name], name
            whole = Schedule([s if s >= self.least else 0.0 for s in pruner.scheduled.sparsity])
            try:
                schedule = self._scaled(setting, cut, profile, pruner.router, whole, kv or self.kv)
            except OutOfReach as error:
                reason = error
                continue
            return self.pruner(setting, pruner.router, schedule, kv)
        raise reason
