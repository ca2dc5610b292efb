"""What a request costs under a pruner, all of it: removed parts and dense looks (`Scout`) included.

Shapes and units as in `flops`, which counts what a schedule or a trace says; the scores that routers read and the
routers themselves are in no FLOPs, but in every clock.
"""

from __future__ import annotations

from torch import nn

from ftp_lightning.pruning.costs import block_costs, remaining_costs
from ftp_lightning.pruning.flops import (
    continuation_flops,
    head_flops,
    prompt_flops,
    realised_flops,
    stored_tokens,
)
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


def planned_cut(model: nn.Module, pruner, tokens: int, new_tokens: int = 0) -> float:
    """Share of the FLOPs of a prompt of `tokens` and `new_tokens` decoding steps that the pruner saves, for planning.

    Negative where looking costs more than skipping saves.
    """
    costs, head, schedule = block_costs(model, pruner.skip_rank), head_flops(model), pruner.schedule
    even = Schedule.uniform(len(costs), 0.0)
    left = remaining_costs(costs, pruner.removed)
    stored = stored_tokens(schedule, tokens, pruner.kv, pruner.parts)
    pruned = prompt_flops(left, schedule, tokens, pruner.kv, head, pruner.parts)
    pruned += continuation_flops(left, tokens, new_tokens, stored, head) + scout_flops(
        model, pruner.router.scout, tokens
    )
    pruned += _instead(costs, pruner, tokens + new_tokens)
    dense = prompt_flops(costs, even, tokens, "evict", head)
    dense += continuation_flops(costs, tokens, new_tokens, [tokens] * len(costs), head)
    return 1.0 - pruned / dense


def realised_cut(model: nn.Module, pruner, trace: Trace, new_tokens: int = 0) -> float:
    """The same of the prompts of a trace, from the very tokens that were computed, rows added up."""
    dense, pruned = realised_flops(model, trace, pruner.kv, new_tokens, pruner.skip_rank, pruner.removed)
    looks = sum((scout_flops(model, pruner.router.scout, int(n)) for n in trace.real.sum(1)), 0.0)
    after = _instead(block_costs(model, pruner.skip_rank), pruner, new_tokens * len(trace.real))
    return 1.0 - (pruned + looks + after) / dense


def kept_bytes(model: nn.Module, pruner, trace: Trace) -> float:
    """Bytes of keys and values that the prompts of a trace leave in the cache, per row; dense: `trace.real` of all."""
    costs, total = remaining_costs(block_costs(model), pruner.removed), 0
    for cost, mode, attended in zip(costs, pruner.kv, trace.keep_attention, strict=True):
        total += cost.cached_bytes * int((trace.real if mode == "keep" else attended).sum())
    return total / len(trace.real)


def _instead(costs, pruner, tokens: int) -> float:
    """FLOPs of what tokens get in place of removed parts (compensation): once for a block, else by part."""
    by_part = pruner.parts != "block"
    places = (
        pruner.removed if by_part else {block for block, _ in pruner.removed if len(pruner.removed_parts(block)) == 2}
    )
    blocks = [block for block, _ in places] if by_part else places
    return tokens * sum(costs[block].skip for block in blocks)
