"""ShortGPT: whole blocks removed."""

from __future__ import annotations

from collections.abc import Iterator

from ftp_lightning.baselines.removal import Part, RemovalPeer
from ftp_lightning.baselines.setting import Setting


class ShortGPT(RemovalPeer):
    """ShortGPT (Men et al. 2024, arXiv 2403.03853): blocks of least Block Influence, 1 - mean cos(x_l, x_{l+1}), are
    removed for every token, generated ones included; a removed block stores no keys and values.

    Adapted: nothing; the influence is what the stage `sensitivity` measures, on calibration prompts. One block stays.
    """

    name, title, paper = "short_gpt", "ShortGPT (blocks removed)", "ShortGPT, arXiv 2403.03853"

    def order(self, setting: Setting) -> Iterator[Part]:
        influence = setting.needed("influence", self.name)
        ascending = sorted(range(len(influence)), key=lambda block: influence[block])
        yield from ((block, "block") for block in ascending[:-1])
