"""What a prompt and its continuation cost: FLOPs and bytes, by schedule, length, kv mode and what is skipped.

What is counted, and what is not, stands in `costs`. Planned numbers take kept tokens as spread evenly; `realised_`
ones count the very tokens of a trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ftp_lightning.costs.per_block import (
    BlockCost,
    block_costs,
    causal_pairs,
    continued_pairs,
    evicted_pairs,
    remaining_costs,
)
from ftp_lightning.costs.stored import stored_bytes
from ftp_lightning.pruning.decide import kept_tokens, reserved_tokens
from ftp_lightning.pruning.trace import Trace
from ftp_lightning.schedule import Schedule

__all__ = [
    "BlockCost", "Parts", "block_costs", "cached_bytes", "causal_pairs", "continuation_flops", "decode_bytes",
    "flops_reduction", "head_flops", "prompt_flops", "realised_flops", "realised_speedup_limit", "row_flops",
    "speedup_limit", "stored_tokens",
]  # fmt: skip

Parts = str | Sequence[str]
"""What a share s_l of the tokens skips, in all blocks or one by one: of `KNOWN_PARTS`."""
KNOWN_PARTS = ("block", "attention", "mlp", "attention+mlp")
"""The block, its attention (the MLP is computed for all), its MLP, or each of the two by a decision of its own."""


def prompt_flops(
    costs: Sequence[BlockCost],
    schedule: Schedule,
    tokens: int,
    kv: str | Sequence[str],
    head: float = 0.0,
    parts: Parts = "block",
    last_only: bool = False,
) -> float:
    """FLOPs to prefill `tokens` tokens, none of them padding.

    With A tokens in the attention and M in the MLP, of T (A, M = kept tokens, or T where that part is not skipped):
    evict: A(keys, values) + A(attention) + M(mlp) + pairs(A among A). keep: T(keys, values) + A(attention) + M(mlp) +
    pairs(A over T). Tokens that skip add `BlockCost.skip`, once for a block, for parts each by its own. `head` is added
    once (last logit only). last_only: of the last block's output nobody reads more than the last token, as in
    `generate`: there A = M = 1 but for keys and values. Plans leave that out: it is no saving of the schedule.
    """
    total = head
    blocks = zip(costs, schedule.sparsity, _modes(kv, len(costs)), _modes(parts, len(costs)), strict=True)
    for index, (cost, sparsity, mode, part) in enumerate(blocks):
        attended, fed = _computed(tokens, sparsity, part)
        keeps = mode == "keep"
        if last_only and part == "block" and index == len(costs) - 1:
            stored = tokens if keeps else attended
            total += _flops(cost, stored, 1, 1, min(stored, cost.window or stored))
            continue
        pairs = causal_pairs(attended, tokens, cost.window) if keeps else evicted_pairs(attended, tokens, cost.window)
        skips = tokens - attended if part == "block" else 2 * tokens - attended - fed
        total += _flops(cost, tokens if keeps else attended, attended, fed, pairs) + skips * cost.skip
    return total


def continuation_flops(
    costs: Sequence[BlockCost], tokens_before: int, new_tokens: int, stored_per_block: Sequence[int], head: float = 0.0
) -> float:
    """FLOPs of `new_tokens` computed in every block (decode policy `dense`) after a prompt of `tokens_before`, of which
    block l has `stored_per_block[l]` in its cache. `head` is added for each."""
    linear = new_tokens * (head + sum(cost.keys_values + cost.other for cost in costs))
    return linear + sum(
        cost.pair * continued_pairs(tokens_before, stored, new_tokens, cost.window)
        for cost, stored in zip(costs, stored_per_block, strict=True)
    )


def flops_reduction(
    model: nn.Module,
    schedule: Schedule,
    prompt_tokens: int,
    kv: str | Sequence[str],
    parts: Parts = "block",
    new_tokens: int = 0,
    rank: int = 0,
) -> float:
    """Share of the FLOPs that the schedule saves, below 1, output head included; for planning, see `causal_pairs`.

    Of the prompt alone, or of the prompt and `new_tokens` forwards of one token after it. `rank`: see `block_costs`.
    """
    return 1.0 - 1.0 / speedup_limit(model, schedule, prompt_tokens, kv, parts, new_tokens, rank)


def speedup_limit(
    model: nn.Module,
    schedule: Schedule,
    length: int,
    kv: str | Sequence[str],
    parts: Parts = "block",
    new_tokens: int = 0,
    rank: int = 0,
) -> float:
    """FLOPs limit of the prefill speed-up at this length, for planning: dense FLOPs / pruned FLOPs, kept tokens spread
    evenly; with `new_tokens` that of the whole request. `rank`: see `block_costs`.

    Under `keep` a router that keeps the latest tokens pays for more pairs than that; `realised_speedup_limit` counts
    them.
    """
    costs, head = block_costs(model, rank), head_flops(model)

    def total(of: Schedule, mode: str | Sequence[str]) -> float:
        stored = stored_tokens(of, length, mode, parts)
        after = continuation_flops(costs, length, new_tokens, stored, head)
        return prompt_flops(costs, of, length, mode, head, parts) + after

    return total(Schedule.uniform(len(costs), 0.0), "evict") / total(schedule, kv)


def realised_speedup_limit(
    model: nn.Module,
    trace: Trace,
    kv: str | Sequence[str],
    new_tokens: int = 0,
    rank: int = 0,
    last_only: bool = False,
) -> float:
    """FLOPs limit of the prompt that was routed: dense FLOPs / FLOPs of the tokens that were really computed.

    last_only: see `prompt_flops`; the dense model computes its last block whole.
    """
    dense, pruned = realised_flops(model, trace, kv, new_tokens, rank, last_only=last_only)
    return dense / pruned


def realised_flops(
    model: nn.Module,
    trace: Trace,
    kv: str | Sequence[str],
    new_tokens: int = 0,
    rank: int = 0,
    removed: Sequence[tuple[int, str]] = (),
    costs: Sequence[BlockCost] | None = None,
    last_only: bool = False,
) -> tuple[float, float]:
    """(dense, pruned) FLOPs of the prompts of a trace, rows added up: see `row_flops`."""
    dense, pruned = row_flops(model, trace, kv, new_tokens, rank, removed, costs, last_only)
    return dense.sum().item(), pruned.sum().item()


def row_flops(
    model: nn.Module,
    trace: Trace,
    kv: str | Sequence[str],
    new_tokens: int | Sequence[int] = 0,
    rank: int = 0,
    removed: Sequence[tuple[int, str]] = (),
    costs: Sequence[BlockCost] | None = None,
    last_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Dense and pruned FLOPs of each prompt that was routed on an empty cache: (B,) float64 both, on the CPU.

    Pairs are counted one by one: a computed token sees, within the window of original positions, all tokens up to
    itself under `keep`, and those computed in the attention under `evict`. `new_tokens` densely computed tokens (of
    every row, or one number per row) may follow. `rank` (see `block_costs`) is counted for every real token that skips:
    once for a block, whose two parts share one mask in the trace, else by each part. `removed`: parts (block,
    "attention" or "mlp") that the tokens that follow skip, too. `costs`: `block_costs(model, rank)`, for whoever asks
    for many traces. `last_only`: see `prompt_flops`; for decisions about whole blocks.
    """
    costs, real = costs or block_costs(model, rank), trace.real
    new = [new_tokens] * len(real) if isinstance(new_tokens, int) else list(new_tokens)
    left = remaining_costs(costs, removed)
    attention, mlp = (getattr(trace, name, None) or trace.keep for name in ("keep_attention", "keep_mlp"))
    dense = head_flops(model) * (1 + torch.tensor(new, dtype=torch.float64))
    pruned = dense.clone()
    whole = {cost: _traced_flops(cost, real, real, real, real, new) for cost in set(costs)}
    blocks = zip(costs, left, attention, mlp, _modes(kv, len(costs)), strict=True)
    for index, (cost, less, attended, fed, mode) in enumerate(blocks):
        dense += whole[cost]
        keyed = real if mode == "keep" else attended
        if last_only and index == len(costs) - 1:
            read = real & (real.cumsum(1) == real.sum(1, keepdim=True))
            pruned += _traced_flops(less, real, keyed, attended & read, fed & read, new)
            continue
        pruned += _traced_flops(less, real, keyed, attended, fed, new)
        pruned += cost.skip * sum(_count(real & ~mask) for mask in {id(m): m for m in (attended, fed)}.values())
    return dense, pruned


def _traced_flops(
    cost: BlockCost, real: Tensor, keyed: Tensor, attended: Tensor, fed: Tensor, new: Sequence[int]
) -> Tensor:
    """(B,) FLOPs of one block, all masks (B, T): `keyed` tokens give keys, `attended` queries, `fed` enter the MLP."""
    keys = keyed.cumsum(1)
    if cost.window is not None and cost.window < keys.shape[1]:
        keys = keys - torch.nn.functional.pad(keys, (cost.window, 0))[:, : keys.shape[1]]
    stored, after = _count(keyed), torch.tensor(new, dtype=torch.float64)
    continued = [
        continued_pairs(n, held, more, cost.window)
        for n, held, more in zip(real.sum(1).tolist(), stored.tolist(), new, strict=True)
    ]
    pairs = _count(keys * attended) + torch.tensor(continued, dtype=torch.float64)
    return _flops(cost, stored + after, _count(attended) + after, _count(fed) + after, pairs)


def _count(values: Tensor) -> Tensor:
    """(B,) float64 on the CPU: the sum of each row."""
    return values.sum(1).to("cpu", torch.float64)


def head_flops(model: nn.Module) -> float:
    """FLOPs of the output head for one token."""
    config = model.config.get_text_config()
    return 2.0 * config.hidden_size * config.vocab_size


def _flops(cost: BlockCost, stored: Any, attended: Any, fed: Any, pairs: Any) -> Any:
    """Of numbers, or of tensors with one number per row."""
    return stored * cost.keys_values + attended * cost.attention + fed * cost.mlp + pairs * cost.pair


def _modes(kv: str | Sequence[str], blocks: int) -> Sequence[str]:
    return (kv,) * blocks if isinstance(kv, str) else kv


def _computed(tokens: int, sparsity: float, parts: str) -> tuple[int, int]:
    """Tokens that enter the attention, and the MLP, of a block. ValueError for unknown parts."""
    if parts not in KNOWN_PARTS:
        raise ValueError(f"parts is {parts!r}, must be one of {', '.join(KNOWN_PARTS)}")
    kept = kept_tokens(tokens, sparsity, reserved_tokens(tokens))
    return (tokens if parts == "mlp" else kept), (tokens if parts == "attention" else kept)


# ---------------------------------------------------------------- bytes


def stored_tokens(schedule: Schedule, tokens: int, kv: str | Sequence[str], parts: Parts = "block") -> list[int]:
    """Tokens that a routed prompt leaves in the cache of each block, per row."""
    modes, named = _modes(kv, schedule.num_blocks), _modes(parts, schedule.num_blocks)
    return [
        tokens if mode == "keep" else _computed(tokens, sparsity, part)[0]
        for sparsity, mode, part in zip(schedule.sparsity, modes, named, strict=True)
    ]


def cached_bytes(
    model: nn.Module, schedule: Schedule, tokens: int, kv: str | Sequence[str], parts: Parts = "block"
) -> int:
    """Bytes of keys and values that a routed prompt leaves in the cache, per row."""
    stored = stored_tokens(schedule, tokens, kv, parts)
    return sum(n * cost.cached_bytes for n, cost in zip(stored, block_costs(model), strict=True))


def decode_bytes(
    model: nn.Module,
    costs: Sequence[BlockCost],
    stored_per_block: Sequence[int],
    skipped: Sequence[bool] | None = None,
    kv: str | Sequence[str] = "keep",
) -> float:
    """Bytes read to decode one token of one row: weights of the computed blocks, cached keys and values that the token
    sees, and the output head.

    A block that the token skips reads the projections of its key and value under `keep`, nothing under `evict`, and its
    compensation where `costs` were made for one.
    """
    skips = [False] * len(costs) if skipped is None else skipped
    total = _head_bytes(model)
    for cost, stored, skip, mode in zip(costs, stored_per_block, skips, _modes(kv, len(costs)), strict=True):
        if not skip:
            seen = stored if cost.window is None else min(stored, cost.window)
            total += cost.weight_bytes + seen * cost.cached_bytes
        else:
            total += cost.skip_bytes + (cost.deposit_bytes if mode == "keep" else 0.0)
    return total


def _head_bytes(model: nn.Module) -> float:
    head = model.get_output_embeddings()
    return 0.0 if head is None else float(sum(map(stored_bytes, head.parameters())))
