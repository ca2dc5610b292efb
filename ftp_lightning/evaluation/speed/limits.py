"""How fast a pruned prefill could be: what the FLOPs allow, and what blocks of the smaller shape really take."""

from __future__ import annotations

from collections.abc import Sequence

from ftp_lightning.costs.flops import BlockCost, block_costs, causal_pairs, head_flops
from ftp_lightning.evaluation.speed.block_clock import BlockClock
from ftp_lightning.pruning.trace import Trace


def most_kept(trace: Trace) -> list[int]:
    """Tokens of the fullest row that enter each block; where no real token skips, the padding goes along."""
    width = trace.real.shape[1]
    return [width if bool((keep == trace.real).all()) else int(keep.sum(1).max()) for keep in trace.keep]


def most_run(trace: Trace) -> list[int]:
    """The same, but for a last block that runs on the token alone whose output is read."""
    most = most_kept(trace)
    return [*most[:-1], 1] if trace.last_only else most


def padded_flops_limit(model, trace: Trace, modes: Sequence[str], rank: int = 0) -> float:
    """FLOPs limit of a batch whose rows differ: dense FLOPs at the longest row / FLOPs at the most kept of a block.

    What padding costs stays in both; `realised_speedup_limit` counts real tokens alone. Kept tokens spread evenly. With
    padding a compensation of `rank` is computed for all tokens.
    """
    costs, longest, head = block_costs(model, rank), trace.real.shape[1], head_flops(model)
    dense = head + sum(_block_flops(cost, longest, longest) for cost in costs)
    pruned = head
    for cost, kept, run, mode in zip(costs, most_kept(trace), most_run(trace), modes, strict=True):
        pruned += _block_flops(cost, run, longest if mode == "keep" else kept)
        pruned += longest * cost.skip if kept < longest and run == kept else 0.0
    return dense / pruned


def _block_flops(cost: BlockCost, kept: int, stored: int) -> float:
    return stored * cost.keys_values + kept * cost.other + causal_pairs(kept, stored) * cost.pair


def shape_limit(clock: BlockClock, dense_ms: float, trace: Trace, modes: Sequence[str]) -> float:
    """Speed-up if a pruned block took what a stock block of its kept tokens takes, and pruning itself nothing [ours].

    dense / (dense - sum t_l(T) + sum t_l(K_l)), t_l(n) the measured time of a block on n tokens (under `keep` with the
    keys and values of all T). Where the blocks measured alone take longer than the whole dense prefill (noise), their
    times are scaled down to it.
    """
    longest = trace.real.shape[1]
    whole = 1e3 * clock.seconds(longest)
    blocks = [1e3 * clock.seconds(kept, mode) for kept, mode in zip(most_run(trace), modes, strict=True)]
    scale = min(1.0, dense_ms / (whole * len(blocks)))
    return dense_ms / (dense_ms + scale * (sum(blocks) - whole * len(blocks)))
