"""All blocks decided at once, after the first (the one-pass router of the paper's ACL ARR version)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ftp_lightning.errors import UserError
from ftp_lightning.routing.base import Needs, RoutingContext, check_made_for
from ftp_lightning.routing.learned import FACTORS, FLOAT32, LearnedRouter, at_least_one, factors
from ftp_lightning.schedule import Schedule


class OnePassRouter(LearnedRouter):
    """p_l = softmax(W_l relu(V f_l + c) + b_l)[compute] for every block l, from the attention that block 0 wrote.

    f_l are the token's factors with the sparsity s_l of block l. The first layer is shared, the head is the block's own
    [ours: a block can differ from the next through nothing else]. Parameters: (factors + 1) * width
    + N * (2 * width + 2). All blocks' p are computed at the first call of a forward; that the attention table stays the
    one of block 0 is promised by `Needs.once`.

    Args: num_blocks, the N blocks of the model; the others as for `LearnedRouter`.
    """

    more = Needs(once="from block 0")

    def __init__(self, num_blocks: int, width: int = 64, names: tuple[str, ...] = FACTORS):
        super().__init__(width, names)
        self.num_blocks = at_least_one("num_blocks", num_blocks)
        self.shared = nn.Linear(len(self.names), self.width, **FLOAT32)
        self.heads = nn.Linear(self.width, 2 * self.num_blocks, **FLOAT32)

    def score(self, context: RoutingContext) -> Tensor:
        """(B, T) p_compute of this block, read from the memo of the forward."""
        memo = context.memo.setdefault(self, {})
        key = context.part, torch.is_grad_enabled()
        if key not in memo:
            memo[key] = self.all_blocks(context)
        return memo[key][..., context.block]

    def all_blocks(self, context: RoutingContext) -> Tensor:
        """(B, T, N) p_compute of every block."""
        return super().score(context)

    def logits(self, context: RoutingContext) -> Tensor:
        """(B, T, N, 2); ValueError where `context.schedule` does not name the sparsity of N blocks."""
        if len(context.schedule) != self.num_blocks:
            raise ValueError(f"one_pass decides {self.num_blocks} blocks, the schedule has {len(context.schedule)}")
        seen = factors(context, self.names)[:, :, None].repeat(1, 1, self.num_blocks, 1)
        if "sparsity" in self.names:
            sparsity = torch.tensor(context.schedule, dtype=seen.dtype, device=seen.device)
            seen[..., self.names.index("sparsity")] = sparsity * context.real[..., None]
        weight, bias = self.heads.weight.unflatten(0, (-1, 2)), self.heads.bias.unflatten(0, (-1, 2))
        return torch.einsum("btnw,now->btno", self.shared(seen).relu(), weight) + bias

    def check_model(self, num_blocks: int, hidden_size: int) -> None:
        check_made_for("blocks", self.num_blocks, num_blocks)

    def check_schedule(self, schedule: Schedule) -> None:
        if (first := schedule.sparsity[0]) > 0:
            raise UserError(
                f"one_pass decides after the first block, which must be dense; its sparsity is {first}.\n"
                "Use a schedule that starts with 0, or another router."
            )

    def config(self) -> dict:
        return {"num_blocks": self.num_blocks, **super().config()}
