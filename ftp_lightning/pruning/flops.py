"""What a prompt costs: floating-point operations and key-value bytes, by schedule, length and kv mode.

A multiply-add counts two. Norms, activations, rotary embedding and the router itself are left out (below 1 % of a
block).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ftp_lightning.pruning.blocks import find_attention, find_blocks
from ftp_lightning.pruning.trace import Trace
from ftp_lightning.schedule import Schedule, kept_tokens


@dataclass(frozen=True)
class BlockCost:
    """FLOPs of one block: per token in the key and value projections, in all other linear maps, and per visible (query,
    key) pair; and the bytes of one cached token."""

    keys_values: float
    other: float
    pair: float
    cached_bytes: int


def block_costs(model: nn.Module) -> list[BlockCost]:
    """Costs of each block, counted from the weights of its linear maps (2 FLOPs per weight and token)."""
    return [_block_cost(block, model) for block in find_blocks(model)]


def _block_cost(block: nn.Module, model: nn.Module) -> BlockCost:
    attention = find_attention(block)
    linear = {
        name: m for name, m in block.named_modules() if getattr(m, "weight", None) is not None and m.weight.dim() == 2
    }
    total = 2.0 * sum(m.weight.numel() for m in linear.values())
    config = model.config
    heads = config.num_attention_heads
    size = getattr(attention, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    keys_values = 2.0 * 2 * config.hidden_size * key_heads * size
    width = next(iter(linear.values())).weight.element_size()
    return BlockCost(keys_values, total - keys_values, 4.0 * heads * size, 2 * key_heads * size * width)


def causal_pairs(queries: int, keys: int) -> float:
    """Visible pairs of `queries` tokens spread evenly over `keys`: the q-th of them sees about q * keys / queries
    [ours]."""
    return queries * (keys + keys / max(queries, 1)) / 2.0 if queries else 0.0


def prompt_flops(
    costs: Sequence[BlockCost], schedule: Schedule, tokens: int, kv: str | Sequence[str], head: float = 0.0
) -> float:
    """FLOPs to prefill `tokens` tokens, none of them padding.

    evict: K(linear) + pairs(K, K). keep: T(keys, values) + K(other) + pairs(K, T). `head` is added once (last logit
    only).
    """
    modes = (kv,) * len(costs) if isinstance(kv, str) else kv
    total = head
    for cost, sparsity, mode in zip(costs, schedule.sparsity, modes, strict=True):
        kept = kept_tokens(tokens, sparsity, 2)
        stored = tokens if mode == "keep" else kept
        total += stored * cost.keys_values + kept * cost.other + causal_pairs(kept, stored) * cost.pair
    return total


def flops_reduction(model: nn.Module, schedule: Schedule, prompt_tokens: int, kv: str | Sequence[str]) -> float:
    """Share of a prompt's FLOPs that the schedule saves, in [0, 1), output head included; for planning, see
    `causal_pairs`."""
    return 1.0 - 1.0 / speedup_limit(model, schedule, prompt_tokens, kv)


def speedup_limit(model: nn.Module, schedule: Schedule, length: int, kv: str | Sequence[str]) -> float:
    """FLOPs limit of the prefill speed-up at this length, for planning: dense FLOPs / pruned FLOPs, kept tokens spread
    evenly.

    Under `keep` a router that keeps the latest tokens pays for more pairs than that; `realised_speedup_limit` counts
    them.
    """
    costs = block_costs(model)
    dense = prompt_flops(costs, Schedule.uniform(len(costs), 0.0), length, "evict", head_flops(model))
    return dense / prompt_flops(costs, schedule, length, kv, head_flops(model))


def realised_speedup_limit(model: nn.Module, trace: Trace, kv: str | Sequence[str]) -> float:
    """FLOPs limit of the prompt that was routed: dense FLOPs / FLOPs of the tokens that were really computed.

    Pairs are counted one by one: a kept token at position i of its row sees i + 1 keys under `keep`, under `evict` the
    kept ones up to itself. Rows are added up.
    """
    costs = block_costs(model)
    modes = (kv,) * len(costs) if isinstance(kv, str) else kv
    lengths = trace.real.sum(1).to(torch.float64)
    head = head_flops(model) * len(lengths)
    dense = sum(_flops(cost, lengths, lengths, _triangle(lengths)) for cost in costs) + head
    position = trace.real.to(torch.float64).cumsum(1)  # from 1: the keys it sees
    pruned = head
    for cost, keep, mode in zip(costs, trace.keep, modes, strict=True):
        kept = keep.sum(1).to(torch.float64)
        pairs = (position * keep).sum(1) if mode == "keep" else _triangle(kept)
        pruned += _flops(cost, lengths if mode == "keep" else kept, kept, pairs)
    return float(dense / pruned)


def realised_flops_reduction(model: nn.Module, trace: Trace, kv: str | Sequence[str]) -> float:
    """Share of the FLOPs that was saved on the prompt that was routed."""
    return 1.0 - 1.0 / realised_speedup_limit(model, trace, kv)


def head_flops(model: nn.Module) -> float:
    """FLOPs of the output head for one token."""
    return 2.0 * model.config.hidden_size * model.config.vocab_size


def _flops(cost: BlockCost, stored: Tensor, kept: Tensor, pairs: Tensor) -> Tensor:
    return (stored * cost.keys_values + kept * cost.other + pairs * cost.pair).sum()


def _triangle(n: Tensor) -> Tensor:
    return n * (n + 1) / 2


def cached_bytes(model: nn.Module, schedule: Schedule, tokens: int, kv: str | Sequence[str]) -> int:
    """Bytes of keys and values that a routed prompt leaves in the cache, per row."""
    costs = block_costs(model)
    modes = (kv,) * len(costs) if isinstance(kv, str) else kv
    stored = (
        tokens if m == "keep" else kept_tokens(tokens, s, 2) for s, m in zip(schedule.sparsity, modes, strict=True)
    )
    return sum(n * cost.cached_bytes for n, cost in zip(stored, costs))
