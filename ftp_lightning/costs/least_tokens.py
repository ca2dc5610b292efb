"""From which length on a prompt is worth pruning."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ftp_lightning.costs.flops import prompt_flops
from ftp_lightning.costs.per_block import block_costs
from ftp_lightning.schedule import Schedule

OVERHEAD = {"cpu": 4e7, "cuda": 5e10}
"""FLOPs that a device could do in the time that a routed block takes beside its matrices, by kind of device [ours]: on
a CPU about 40 million (docs/benchmarks.md), on an accelerator estimated from some 60 launches, not measured."""
MARGIN = 2.0
"""How many times its overhead a routed block must save [ours]: noise is no reason to be slower than dense."""
LONGEST = 1 << 20


def routed_from(model: nn.Module, pruner) -> int:
    """Tokens from which on `pruner` routes a prompt of `model`: its `least_tokens`, with "auto" worked out.

    0 where parts are removed: they are entered by no token of any prompt.
    """
    if pruner.removed:
        return 0
    if pruner.least_tokens != "auto":
        return pruner.least_tokens
    return 0 if pruner.schedule is None else least_tokens(model, pruner.schedule, pruner.kv)


def least_tokens(model: nn.Module, schedule: Schedule, kv: str | Sequence[str]) -> int:
    """The shortest prompt whose saved FLOPs are worth the overhead: dense(T) - pruned(T) >= 2 N_routed overhead.

    Chosen from the model's shape, the schedule and the kind of device alone [ours]. Returns tokens, at most 2^20; 0
    where nothing is routed.
    """
    costs, routed = block_costs(model), sum(s > 0.0 for s in schedule.sparsity)
    kind = next(model.parameters()).device.type
    wanted = MARGIN * routed * OVERHEAD.get(kind, OVERHEAD["cpu"])
    dense = Schedule.uniform(len(costs), 0.0)

    def pays(tokens: int) -> bool:
        return prompt_flops(costs, dense, tokens, kv) - prompt_flops(costs, schedule, tokens, kv) >= wanted

    if not routed:
        return 0
    high = 1
    while high < LONGEST and not pays(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high
