"""FFN-only skipping by attention."""

from __future__ import annotations

from collections.abc import Iterator

from ftp_lightning.baselines.peer import Peer
from ftp_lightning.baselines.selectors import AttentionSelector
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.routing import Router
from ftp_lightning.schedule import Schedule


class FfnOnly(Peer):
    """Tokens skip the feed-forward part alone, attention is computed for all: FFN-SkipLLM (Jaiswal et al. 2024, arXiv
    2404.03865), whose first and last blocks skip nothing.

    Adapted: for prompt tokens, and those of least attention received skip; FFN-SkipLLM skips at decoding, by the cosine
    of the part's input and output. A sixth of the blocks at either end is dense.
    """

    name, title, paper = "ffn_only", "FFN-only, by attention", "FFN-SkipLLM, arXiv 2404.03865"
    kv, parts = "keep", "mlp"

    def tries(self, setting: Setting) -> Iterator[tuple[Router, Schedule]]:
        blocks, edge = setting.blocks, max(1, setting.blocks // 6)
        inside = range(edge, blocks - edge) if blocks > 2 * edge else range(1, blocks)
        yield AttentionSelector(), Schedule([float(block in inside) for block in range(blocks)])
