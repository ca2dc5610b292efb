"""LazyLLM: progressive pruning by the last token's attention."""

from __future__ import annotations

from collections.abc import Iterator

from ftp_lightning.baselines.peer import Peer, ever_flatter, steps
from ftp_lightning.baselines.selectors import AttentionSelector
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.routing import Router
from ftp_lightning.schedule import Schedule


class LazyLLM(Peer):
    """LazyLLM (Fu et al. 2024, arXiv 2407.14057): a token enters a block by the attention, averaged over heads, that
    the prompt's last token paid it in the block before; later blocks keep fewer.

    Adapted: `window=1` of our scores is that attention (times the number of tokens, which orders nothing). Three steps,
    a third more each quarter of the depth, for the paper's percentiles, which are tuned per task; flatter ones where
    the budget would take more than 80 % of a block. Revival: a skipped
    token competes in every later block with what was last said of it; LazyLLM brings tokens back at later decoding
    steps, from a second cache, where here the prompt is prefilled once and generated tokens see what it left.
    """

    name, title, paper = "lazy_llm", "LazyLLM (last token's attention)", "LazyLLM, arXiv 2407.14057"
    window, most = 1, 0.8

    def tries(self, setting: Setting) -> Iterator[tuple[Router, Schedule]]:
        for form in ever_flatter(steps(setting.blocks)):
            yield AttentionSelector(), form
