"""SkipGPT: attention and MLP decided apart, by trained routers on the hidden state."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ftp_lightning.baselines.peer import Peer, even, first_dense
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.routing import Router
from ftp_lightning.routing.base import Needs, RoutingContext, check_made_for
from ftp_lightning.routing.hidden import unit_scale
from ftp_lightning.routing.learned import FLOAT32, LearnedRouter
from ftp_lightning.schedule import Schedule


class SkipGPTRouter(LearnedRouter):
    """p_compute = softmax(W_{l,part} x / rms(x))[compute], x the block's input: one linear map per block and part."""

    more = Needs(hidden=True)

    def __init__(self, num_blocks: int, hidden_size: int):
        super().__init__(1, None)
        self.num_blocks, self.hidden_size = num_blocks, hidden_size
        self.maps = nn.ModuleDict(
            {
                part: nn.ModuleList(nn.Linear(hidden_size, 2, **FLOAT32) for _ in range(num_blocks))
                for part in ("attention", "mlp")
            }
        )

    def logits(self, context: RoutingContext) -> Tensor:
        return self.maps[context.part][context.block](unit_scale(context.hidden, context.real))

    def check_model(self, num_blocks: int, hidden_size: int) -> None:
        check_made_for("blocks", self.num_blocks, num_blocks)
        check_made_for("hidden units", self.hidden_size, hidden_size)

    def config(self) -> dict:
        return {"num_blocks": self.num_blocks, "hidden_size": self.hidden_size}


class SkipGPT(Peer):
    """SkipGPT (Zhao et al. 2025, arXiv 2506.04179): each token enters or skips the attention and the MLP of each block
    by a decision of its own; keys and values of all tokens are kept.

    Adapted: the routers alone are trained, with our losses (its first stage; its second one, adapters in the model, is
    left out); both parts are decided on the block's input (SkipGPT's MLP router sees what the attention has added).
    SkipGPT learns how much each block and part skips under one global share; that is not trained here. Its own schedule
    is ours: the same share in every block and part, and a dense first block, which such a learner would hardly touch.
    """

    name, title, paper = "skip_gpt", "SkipGPT (attention and MLP apart)", "SkipGPT, arXiv 2506.04179"
    kv, parts = "keep", "attention+mlp"
    trained = seeded = True

    def tries(self, setting: Setting) -> Iterator[tuple[Router, Schedule]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            router = SkipGPTRouter(setting.blocks, setting.hidden_size)
        yield router, first_dense(even(setting.blocks))
