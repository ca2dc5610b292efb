"""POP: the last blocks are skipped by the whole prompt but its first and last token."""

from __future__ import annotations

from ftp_lightning.baselines.peer import Peer
from ftp_lightning.baselines.setting import Profile, Setting
from ftp_lightning.costs.budget import OutOfReach, late_blocks
from ftp_lightning.costs.request import planned_cut
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import StaticRouter
from ftp_lightning.schedule import Schedule


class LateBlocks(Peer):
    """POP (2026, arXiv 2602.03295): the prompt skips the last blocks, keys and values of all tokens kept.

    From the last block down, blocks are skipped by every prompt token but the first and the last, until the cut is
    reached; in the last block reached, the static router keeps as many tokens as the cut needs. Adapted: that block.
    """

    name, title, paper = "late_blocks", "late blocks skipped (POP)", "POP, arXiv 2602.03295"
    kv, own_schedule_only = "keep", True

    def placed(
        self, setting: Setting, cut: float, profile: Profile, form: Schedule | None, kv: str | None
    ) -> TokenPruner:
        def pruner(skipped: float) -> TokenPruner:
            return self.pruner(setting, StaticRouter(), Schedule(late_blocks(setting.blocks, skipped)), kv)

        def reached(skipped: float) -> float:
            return planned_cut(setting.model, pruner(skipped), profile.prompt_tokens, profile.new_tokens)

        low, high = 0.0, setting.blocks - 1.0  # the first block stays dense
        if reached(high) < cut:
            raise OutOfReach(f"{self.name} cannot cut {cut:.0%} of the FLOPs: the first block must stay.")
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if reached(middle) < cut else (low, middle)
        return pruner(high)
