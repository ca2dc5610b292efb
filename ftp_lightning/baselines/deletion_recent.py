"""Prompt deletion: the first token and the latest ones are left."""

from __future__ import annotations

from collections.abc import Iterator

from ftp_lightning.baselines.peer import Peer, even
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.routing import Router, StaticRouter
from ftp_lightning.schedule import Schedule


class DeletionRecent(Peer):
    """The same tokens in every block, the first one included, and no keys of the others anywhere: as if they had been
    cut out of the prompt before block 0, at their original positions. Truncation, the oldest baseline; with the sink
    token kept as in StreamingLLM (Xiao et al. 2023, arXiv 2309.17453). The static router under a uniform schedule and
    `evict` is just that. Adapted: nothing."""

    name, title = "deletion_recent", "prompt deletion, recent + sink left"
    paper = "StreamingLLM, arXiv 2309.17453"
    own_schedule_only = True

    def tries(self, setting: Setting) -> Iterator[tuple[Router, Schedule]]:
        yield StaticRouter(), even(setting.blocks)
