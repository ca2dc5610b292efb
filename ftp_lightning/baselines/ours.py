"""The method of this package among its peers: the static router, and a trained one, under a searched schedule."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ftp_lightning.baselines.peer import Peer
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.errors import UserError
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
