"""A router that looks at the hidden state and at the factors."""

from __future__ import annotations

import torch
from torch import Tensor

from ftp_lightning.routing.base import RoutingContext
from ftp_lightning.routing.hidden import HiddenRouter, unit_scale
from ftp_lightning.routing.learned import FACTORS, factors


class HiddenFactorsRouter(HiddenRouter):
    """p_compute = softmax(MLP([x / rms(x), factors]))[compute] (paper, Table 5: `hidden+factors`).

    Args: as for `HiddenRouter`; `names` as for `LearnedRouter`.
    """

    def __init__(self, hidden_size: int, width: int = 64, names: tuple[str, ...] = FACTORS):
        self._make(hidden_size, width, names)

    def logits(self, context: RoutingContext) -> Tensor:
        seen = unit_scale(context.hidden, context.real), factors(context, self.names)
        return self.mlp(torch.cat(seen, dim=-1))
