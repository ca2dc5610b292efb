"""Measured time of a prefill, dense and pruned side by side."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.flops import realised_speedup_limit


@dataclass(frozen=True)
class Speed:
    """Prefill of `batch` prompts of `length` tokens: median milliseconds, and the speed-up of the pairs.

    `ratio` = median of dense / pruned over the pairs, its 95 % bootstrap interval is [ratio_low, ratio_high];
    `sparsity` was realised, `flops_limit` = dense FLOPs / pruned FLOPs is what no kernel can exceed by saving work
    alone.
    """

    length: int
    batch: int
    pairs: int
    dense_ms: float
    pruned_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    sparsity: float
    flops_limit: float


@torch.no_grad()
def prefill_speed(
    model, pruner, length: int, batch: int = 1, pairs: int = 15, warmup: int = 3, *, generator: torch.Generator
) -> Speed:
    """Time `pairs` dense and pruned prefills in turn in one process, cache filled and last logit computed [ours].

    Which of a pair goes first alternates; attaching is outside the clock, the router inside. The tokens are random:
    where the router reads hidden states or attention, look at the realised sparsity. generator: on the CPU, draws
    tokens and bootstrap. UserError where the model's positions end before `length`.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or length
    if length > limit:
        raise UserError(f"length is {length}, the model takes {limit} tokens\nMeasure a shorter prompt.")
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(model.device)
    times = [_pair(model, pruner, ids, dense_first=i % 2 == 0) for i in range(warmup + pairs)][warmup:]
    dense, pruned = torch.tensor(times, dtype=torch.float64).T
    ratio = dense / pruned
    low, high = _median_interval(ratio, generator)
    return Speed(
        length=length,
        batch=batch,
        pairs=pairs,
        dense_ms=1e3 * dense.median().item(),
        pruned_ms=1e3 * pruned.median().item(),
        ratio=ratio.median().item(),
        ratio_low=low,
        ratio_high=high,
        sparsity=pruner.trace.prompt.row_sparsity.mean().item(),
        flops_limit=realised_speedup_limit(model, pruner.trace.prompt, pruner.kv),
    )


def _pair(model, pruner, ids: Tensor, dense_first: bool) -> tuple[float, float]:
    """Seconds of a dense and of a pruned prefill."""
    dense = _seconds(model, ids) if dense_first else None
    with pruner(model):
        pruned = _seconds(model, ids)
    return (_seconds(model, ids) if dense is None else dense), pruned


def _seconds(model, ids: Tensor) -> float:
    _wait(ids.device)
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    _wait(ids.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """Kernels on an accelerator run behind the clock's back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median_interval(values: Tensor, generator: torch.Generator, samples: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median."""
    drawn = torch.randint(len(values), (samples, len(values)), generator=generator)
    low, high = values[drawn].median(dim=1).values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high
