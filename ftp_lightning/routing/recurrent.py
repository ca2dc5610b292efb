"""A router that remembers, per token, what it saw at the blocks before (the paper's `recurrent` router)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ftp_lightning.routing.base import RoutingContext
from ftp_lightning.routing.learned import FACTORS, FLOAT32, LearnedRouter, factors


class RecurrentRouter(LearnedRouter):
    """h_l = GRU(factors_l, h_k), p_compute = softmax(W h_l + b)[compute]; one cell for all blocks (paper, Table 4).

    h_k is the token's state at the decision before: k < l is the last routed block, or the attention of the same block
    where its parts are decided apart; zeros before the first. Blocks that are not asked are passed over. [ours] A GRU
    cell: the paper does not name one. Parameters: 3 * width * (factors + width + 2) + 2 * width + 2.

    Args: width of the state h; `names` as for `LearnedRouter`.
    """

    def __init__(self, width: int = 16, names: tuple[str, ...] = FACTORS):
        super().__init__(width, names)
        self.cell = nn.GRUCell(len(self.names), self.width, **FLOAT32)
        self.head = nn.Linear(self.width, 2, **FLOAT32)

    def logits(self, context: RoutingContext) -> Tensor:
        # The inputs are kept, not only the states: a call with gradient finds its own chain of states, with gradient,
        # through blocks that were only asked without.
        inputs, states = context.memo.setdefault(self, ({}, {}))
        site = 2 * context.block + (context.part == "mlp")
        inputs[site] = factors(context, self.names)
        grad, state = torch.is_grad_enabled(), None
        for earlier in sorted(key for key in inputs if key <= site):
            if (earlier, grad) not in states:
                states[earlier, grad] = self._step(inputs[earlier], state)
            state = states[earlier, grad]
        return self.head(state)

    def _step(self, seen: Tensor, state: Tensor | None) -> Tensor:
        """(B, T, F), (B, T, width) -> (B, T, width): every token is a row of its own."""
        flat = None if state is None else state.flatten(0, 1)
        return self.cell(seen.flatten(0, 1), flat).unflatten(0, seen.shape[:2])
