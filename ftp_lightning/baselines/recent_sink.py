"""Recent tokens and the sink."""

from __future__ import annotations

from collections.abc import Iterator

from ftp_lightning.baselines.peer import Peer, even
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.routing import Router, StaticRouter
from ftp_lightning.schedule import Schedule


class RecentSink(Peer):
    """The first token and the latest ones enter each block: StreamingLLM's choice (Xiao et al. 2023, arXiv 2309.17453),
    which is FTP's static router. Adapted: keys and values are kept for all tokens; under `evict` and this schedule it
    is `deletion_recent`, which has a row of its own."""

    name, title, paper = "recent_sink", "recent + sink tokens (static router)", "StreamingLLM, arXiv 2309.17453"
    kv = "keep"

    def tries(self, setting: Setting) -> Iterator[tuple[Router, Schedule]]:
        yield StaticRouter(), even(setting.blocks)
