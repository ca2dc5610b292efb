"""One cell of the study of prefills: how fast a pruned one is, beside what its FLOPs and its shapes allow."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ftp_lightning.costs.budget import default_with_cut, solve_budget, stages_with_cut
from ftp_lightning.costs.flops import realised_flops
from ftp_lightning.costs.request import scout_flops
from ftp_lightning.evaluation.speed.block_clock import BlockClock
from ftp_lightning.evaluation.speed.limits import shape_limit
from ftp_lightning.evaluation.speed.prefill import prefill_speed
from ftp_lightning.evaluation.speed.prompts import Prompts, random_prompts
from ftp_lightning.models import load
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import StaticRouter
from ftp_lightning.studies.grid import Cell

if TYPE_CHECKING:
    from pandas import DataFrame

SHORT = 256
PAIRS, MOST = 15, 201
"""Pairs of prefills from SHORT tokens on, and at most: shorter prompts are cheaper, and their times differ more."""


@dataclass(frozen=True)
class Prefill(Cell):
    model: str
    dtype: str
    tokens: int
    shape: str
    cut: float


@lru_cache(maxsize=1)
def loaded(model: str, dtype: str) -> Any:
    return load(model, dtype=dtype)[0].eval()


def placed(cell: Prefill, model: Any) -> TokenPruner:
    """The pruner of a cell's shape and cut."""
    if cell.shape == "default":
        return TokenPruner(StaticRouter(), default_with_cut(model, cell.cut, 1024, None), least_tokens="auto")
    if cell.shape == "stages":
        return TokenPruner(StaticRouter(), stages_with_cut(model, cell.cut, cell.tokens))
    return TokenPruner(StaticRouter(), solve_budget(model, cell.cut, cell.tokens, "evict").under("evict"))


def timed(
    model: Any, pruner: TokenPruner, prompts: Prompts, pairs: int, generator: torch.Generator, settled: bool = False
) -> dict[str, float]:
    """Dense and pruned prefills in turn, by the processor time of this thread: dense / pruned with its 95 % interval,
    both medians in milliseconds, and what the FLOPs allow."""
    found = prefill_speed(model, pruner, prompts, pairs, generator=generator, clock=time.process_time, settled=settled)
    trace, ratio = pruner.trace.routed, found.ratio
    dense, left = realised_flops(model, trace, pruner.kv, rank=pruner.skip_rank, last_only=trace.last_only)
    left += scout_flops(model, pruner.router.needs.scout, prompts.ids.shape[1])
    row = {"speedup": ratio.value, "low": ratio.low, "high": ratio.high, "flops_limit": dense / left}
    return row | {"dense_ms": found.dense_ms, "pruned_ms": found.pruned_ms, "pairs": found.pairs}


def measure(cell: Prefill) -> DataFrame:
    """`timed`, and what stock blocks of the kept count allow."""
    from pandas import DataFrame

    model, generator = loaded(cell.model, cell.dtype), torch.Generator().manual_seed(0)
    prompts = random_prompts(model, cell.tokens, 1, generator=generator)
    pruner, pairs = placed(cell, model), max(PAIRS, min(MOST, PAIRS * SHORT // cell.tokens))
    row = timed(model, pruner, prompts, pairs, generator, settled=cell.tokens < SHORT)
    clock = BlockClock(model, prompts, clock=time.process_time)
    return DataFrame([row | {"shape_limit": shape_limit(clock, row["dense_ms"], pruner.trace.routed, pruner.kv)}])
