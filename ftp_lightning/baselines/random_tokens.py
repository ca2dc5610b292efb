"""Random tokens, drawn anew in every block."""

from __future__ import annotations

from collections.abc import Iterator

from ftp_lightning.baselines.peer import Peer, even
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.routing import RandomRouter, Router
from ftp_lightning.schedule import Schedule


class RandomTokens(Peer):
    """Random tokens enter each block (FTP, arXiv 2412.11494, Table 4). Adapted: drawn by a hash, see `RandomRouter`."""

    name, title, paper = "random", "random tokens", "FTP, arXiv 2412.11494"
    seeded = True

    def tries(self, setting: Setting) -> Iterator[tuple[Router, Schedule]]:
        yield RandomRouter(setting.seed), even(setting.blocks)
