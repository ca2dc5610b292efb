"""What a request costs under a pruner, all of it: removed parts and dense looks (`Scout`) included.

Shapes and units as in `flops`, which counts what a schedule or a trace says; the scores that routers read and the
routers themselves are in no FLOPs, but in every clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ftp_lightning.costs.flops import (
    continuation_flops,
    head_flops,
    prompt_flops,
    row_flops,
    stored_tokens,
)
from ftp_lightning.costs.least_tokens import routed_from
from ftp_lightning.costs.per_block import BlockCost, block_costs, remaining_costs
from ftp_lightning.pruning.trace import Trace
from ftp_lightning.routing.base import Scout
from ftp_lightning.schedule import Schedule


def scout_flops(model: nn.Module, scout: Scout | None, tokens: int) -> float:
    """FLOPs of a dense look at `tokens` prompt tokens: of its blocks, or of the whole model with the head for each."""
    if scout is None:
        return 0.0
    costs, whole = block_costs(model), scout.kind == "surprisal"
    costs = costs if whole else costs[: scout.blocks]
    head = tokens * head_flops(model) if whole else 0.0
    return prompt_flops(costs, Schedule.uniform(len(costs), 0.0), tokens, "evict", head) if costs else 0.0


def planned_cut(
    model: nn.Module, pruner, tokens: int, new_tokens: int = 0, costs: list[BlockCost] | None = None
) -> float:
    """Share of the FLOPs of a prompt of `tokens` and `new_tokens` decoding steps that the pruner saves, for planning.

    Negative where looking costs more than skipping saves, 0 for prompts shorter than the pruner's `least_tokens`.
    costs: `block_costs` at the pruner's skip rank, if at hand.
    """
    if tokens < routed_from(model, pruner):
        return 0.0
    costs = block_costs(model, pruner.skip_rank) if costs is None else costs
    head, schedule = head_flops(model), pruner.schedule
    even = Schedule.uniform(len(costs), 0.0)
    left = remaining_costs(costs, pruner.removed)
    stored = stored_tokens(schedule, tokens, pruner.kv, pruner.parts)
    pruned = prompt_flops(left, schedule, tokens, pruner.kv, head, pruner.parts)
    pruned += continuation_flops(left, tokens, new_tokens, stored, head) + scout_flops(
        model, pruner.router.needs.scout, tokens
    )
    pruned += _instead(costs, pruner, tokens + new_tokens)
    dense = prompt_flops(costs, even, tokens, "evict", head)
    dense += continuation_flops(costs, tokens, new_tokens, [tokens] * len(costs), head)
    return 1.0 - pruned / dense


@dataclass(frozen=True)
class RowCosts:
    """What each routed prompt costs, with the tokens that follow it, and what it costs dense.

    flops, dense_flops: of the prompt and its new tokens. kv_bytes, dense_kv_bytes: keys and values that the prompt
    leaves in the cache.
    """

    dense_flops: list[float]
    flops: list[float]
    dense_kv_bytes: list[float]
    kv_bytes: list[float]

    @property
    def cut(self) -> float:
        """Share of the FLOPs that is saved, all rows added up."""
        return 1.0 - math.fsum(self.flops) / math.fsum(self.dense_flops)


def row_costs(
    model: nn.Module,
    pruner,
    trace: Trace,
    new_tokens: int | Sequence[int] = 0,
    costs: list[BlockCost] | None = None,
) -> RowCosts:
    """FLOPs and bytes of each prompt of a trace, from the very tokens that were computed.

    new_tokens: computed densely after every prompt; one number, or one per row. costs: as of `planned_cut`.
    """
    costs = block_costs(model, pruner.skip_rank) if costs is None else costs
    real = trace.real.sum(1).tolist()
    new = [new_tokens] * len(real) if isinstance(new_tokens, int) else list(new_tokens)
    dense, pruned = row_flops(model, trace, pruner.kv, new, pruner.skip_rank, pruner.removed, costs)
    looks = {tokens: scout_flops(model, pruner.router.needs.scout, tokens) for tokens in set(real)}
    more = [looks[tokens] + _instead(costs, pruner, after) for tokens, after in zip(real, new)]
    held = torch.zeros(len(real), dtype=torch.float64)
    for cost, mode, attended in zip(
        remaining_costs(costs, pruner.removed), pruner.kv, trace.keep_attention, strict=True
    ):
        held += cost.cached_bytes * (trace.real if mode == "keep" else attended).sum(1).cpu()
    every = sum(cost.cached_bytes for cost in costs)
    flops = [one + other for one, other in zip(pruned.tolist(), more)]
    return RowCosts(dense.tolist(), flops, [float(tokens * every) for tokens in real], held.tolist())


def _instead(costs, pruner, tokens: int) -> float:
    """FLOPs of what tokens get in place of removed parts (compensation): once for a block, else by part."""
    times = {block: len(pruner.removed_parts(block)) for block, _ in pruner.removed}
    parts = pruner.parts_by_block
    return tokens * sum(costs[b].skip * (n // 2 if parts[b] == "block" else n) for b, n in times.items())
