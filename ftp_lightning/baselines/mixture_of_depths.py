"""Mixture-of-Depths: a trained router on the hidden state, every other block."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ftp_lightning.baselines.peer import Peer
from ftp_lightning.baselines.setting import Setting
from ftp_lightning.routing import HiddenRouter, Router
from ftp_lightning.schedule import Schedule


class MixtureOfDepths(Peer):
    """Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258): every other block takes the top-k tokens by a router on
    their hidden state; the others pass it by, and are not seen in it.

    Adapted: the model stays frozen and the router alone is trained, with our losses (MoD trains both from scratch); our
    `HiddenRouter`, an MLP shared by the blocks, for a linear map in each; no causal predictor, as only prompts are
    routed. Every other block reaches about half of the FLOPs; beyond, there is no row.
    """

    name, title, paper = "mod", "Mixture-of-Depths (hidden router)", "Mixture-of-Depths, arXiv 2404.02258"
    trained = seeded = True

    def tries(self, setting: Setting) -> Iterator[tuple[Router, Schedule]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            router = HiddenRouter(setting.hidden_size)
        yield router, Schedule([float(block % 2) for block in range(setting.blocks)])
