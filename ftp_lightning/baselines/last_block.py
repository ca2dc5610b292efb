"""Dense, last block free: what nobody should be credited for."""

from __future__ import annotations

from ftp_lightning.baselines.peer import Peer
from ftp_lightning.baselines.setting import Profile, Setting
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import StaticRouter
from ftp_lightning.schedule import Schedule


class LastBlockFree(Peer):
    """Every token of the prompt skips the last block but the first and the last one, keys and values kept: nobody reads
    the others' outputs, so that what follows is exactly dense [ours, method.md section 12]. It has one point, not a
    budget: `cut` is ignored."""

    name, title, paper = "last_block_free", "dense, last block free", "ours: an identity"
    kv, own_schedule_only = "keep", True

    def placed(
        self, setting: Setting, cut: float, profile: Profile, form: Schedule | None, kv: str | None
    ) -> TokenPruner:
        return self.pruner(setting, StaticRouter(), Schedule([0.0] * (setting.blocks - 1) + [1.0]))
