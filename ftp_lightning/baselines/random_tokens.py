"""Random tokens, drawn anew in every block."""

from __future__ import annotations

from ftp_lightning.baselines.allocated import Uniform
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.routing import RandomRouter, Router


class RandomTokens(Uniform):
    """Random tokens enter each block (FTP, arXiv 2412.11494, Table 4). Adapted: drawn by a hash, see `RandomRouter`."""

    name, title, paper = "random", "random tokens", "FTP, arXiv 2412.11494"
    seeded = True

    def router(self, setting: Setting) -> Router:
        return RandomRouter(setting.seed)
