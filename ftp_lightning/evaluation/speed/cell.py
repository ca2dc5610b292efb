"""One row of the benchmark: everything that is measured at one length, batch, schedule and kv mode."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import torch

from ftp_lightning.costs.flops import realised_speedup_limit
from ftp_lightning.evaluation.speed import memory
from ftp_lightning.evaluation.speed import prefill as speed
from ftp_lightning.evaluation.speed.block_clock import BlockClock
from ftp_lightning.evaluation.speed.limits import padded_flops_limit, shape_limit
from ftp_lightning.evaluation.speed.prompts import Prompts
from ftp_lightning.pruning import TokenPruner

LAUNCH_BOUND = 5.0
"""A dense prefill below so many times its own time at one token is mostly launching kernels [ours]."""


@dataclass
class Bench:
    """A model to measure cells on. `notes`: why figures are missing, each said once.

    pairs: of prefills; decode_tokens: steps of decoding, 0 = none; generator: on the CPU, draws the bootstraps.
    """

    model: Any
    pairs: int
    decode_tokens: int
    generator: torch.Generator
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        reason = memory.why_no_peak(self.model.device)
        self.weighs = reason is None
        if reason:
            self.note(f"no peak memory: {reason}")

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def cell(self, pruner: TokenPruner, prompts: Prompts, clock: BlockClock) -> dict[str, Any]:
        """The measured columns; times in milliseconds, sizes in bytes, shares and ratios as plain numbers."""
        more = {"generator": self.generator}
        found = speed.prefill_speed(self.model, pruner, prompts, self.pairs, **more)
        limits = self._limits(pruner, prompts, clock, found.dense_ms)
        one_token = speed.one_token_ms(self.model, prompts)
        overhead = speed.router_overhead(self.model, pruner, prompts, self.pairs, **more)
        return {
            "speedup": found.ratio.value,
            "low": found.ratio.low,
            "high": found.ratio.high,
            **limits,
            "limit_share": found.ratio.value / limits["flops_limit"],
            "dense_ms": found.dense_ms,
            "pruned_ms": found.pruned_ms,
            "one_token_ms": one_token,
            "launch_bound": found.dense_ms < LAUNCH_BOUND * one_token,
            "realised_sparsity": pruner.trace.routed.row_sparsity.mean().item(),
            "pairs": found.pairs,
            "overhead_share": overhead.value,
            "overhead_low": overhead.low,
            "overhead_high": overhead.high,
            **self._decode(pruner, prompts),
            **self._memory(pruner, prompts),
        }

    def _limits(self, pruner: TokenPruner, prompts: Prompts, clock: BlockClock, dense_ms: float) -> dict[str, Any]:
        trace, modes, rank = pruner.trace.routed, pruner.kv, pruner.skip_rank
        limits: dict[str, Any] = {
            "flops_limit": realised_speedup_limit(self.model, trace, modes, rank=rank, last_only=trace.last_only)
        }
        padded = prompts.mask is not None
        limits["padded_flops_limit"] = padded_flops_limit(self.model, trace, modes, rank) if padded else None
        try:
            return limits | {"shape_limit": shape_limit(clock, dense_ms, trace, modes)}
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # families differ in what a block wants; the other figures stand without this one
            self.note(f"no shape_limit: a block cannot be timed alone ({type(error).__name__}: {error})")
            return limits | {"shape_limit": None}

    def _decode(self, pruner: TokenPruner, prompts: Prompts) -> dict[str, Any]:
        names = ("dense_ms", "pruned_ms", "speedup", "low", "high")
        values: tuple[float | None, ...] = (None,) * len(names)
        if self.decode_tokens:
            found = speed.decode_speed(self.model, pruner, prompts, self.decode_tokens, generator=self.generator)
            values = (found.dense_ms, found.pruned_ms, found.ratio.value, found.ratio.low, found.ratio.high)
        return {"decode_tokens": self.decode_tokens, **{f"decode_{name}": v for name, v in zip(names, values)}}

    @torch.no_grad()
    def _memory(self, pruner: TokenPruner, prompts: Prompts) -> dict[str, int | None]:
        """Peaks and cache sizes, stock and pruned; apart from the timing, one prefill in memory at a time."""

        def weigh() -> tuple[int | None, int]:
            held = memory.cache_bytes(speed.prefill(self.model, prompts).past_key_values)
            device = self.model.device
            return memory.peak_bytes(lambda: speed.prefill(self.model, prompts), device) if self.weighs else None, held

        gc.collect()
        dense_peak, dense_held = weigh()
        with pruner(self.model):
            pruned_peak, pruned_held = weigh()
        return {
            "memory_dense_bytes": dense_peak,
            "memory_pruned_bytes": pruned_peak,
            "kv_bytes_dense": dense_held,
            "kv_bytes_pruned": pruned_held,
        }
