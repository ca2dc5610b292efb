"""The study of prefills: how fast pruned ones are, beside what their FLOPs and their shapes allow."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftp_lightning.costs.budget import default_with_cut, solve_budget, stages_with_cut
from ftp_lightning.costs.flops import realised_flops
from ftp_lightning.costs.request import scout_flops
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.speed.block_clock import BlockClock
from ftp_lightning.evaluation.speed.limits import shape_limit
from ftp_lightning.evaluation.speed.prefill import Speed, prefill_speeds
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


def _placed(cell: Prefill, model: Any) -> TokenPruner | None:
    """None for a cell that is refused."""
    try:
        return placed(cell, model)
    except UserError:
        return None


def timed(
    model: Any,
    pruners: Sequence[TokenPruner],
    prompts: Prompts,
    rounds: int,
    generator: torch.Generator,
    settled: bool = False,
) -> list[dict[str, Any]]:
    """Dense prefills and those under each pruner in turn, by the processor time of this thread: of each pruner dense /
    pruned with its 95 % interval, both medians in milliseconds, and what the FLOPs allow."""
    about: Any = {"generator": generator, "clock": time.process_time, "settled": settled}
    found = prefill_speeds(model, pruners, prompts, rounds, **about)
    return [_row(model, pruner, prompts, speed) for pruner, speed in zip(pruners, found, strict=True)]


def _row(model: Any, pruner: TokenPruner, prompts: Prompts, found: Speed) -> dict[str, Any]:
    trace, ratio = pruner.trace.routed, found.ratio
    dense, left = realised_flops(model, trace, pruner.kv, rank=pruner.skip_rank, last_only=trace.last_only)
    left += scout_flops(model, pruner.router.needs.scout, prompts.ids.shape[1])
    row = {"speedup": ratio.value, "low": ratio.low, "high": ratio.high, "flops_limit": dense / left}
    return row | {"dense_ms": found.dense_ms, "pruned_ms": found.pruned_ms, "pairs": found.pairs}


@dataclass(frozen=True)
class Prefills:
    """Measures cells; those of one model, precision and length that `folder` lacks share the dense prefill of a round.

    Attributes:
        cells: of the whole grid. folder: where a cell that is finished has its file.
    """

    cells: tuple[Prefill, ...]
    folder: Path

    def measure(self, cell: Prefill) -> DataFrame:
        """`timed`, and what stock blocks of the kept count allow."""
        from pandas import DataFrame

        placed(cell, loaded(cell.model, cell.dtype))  # a cell that cannot be placed is refused alone
        return DataFrame([self._together(cell.model, cell.dtype, cell.tokens)[cell]])

    @lru_cache(maxsize=1)  # noqa: B019  it lives as long as the process
    def _together(self, name: str, dtype: str, tokens: int) -> dict[Prefill, dict[str, Any]]:
        model, generator = loaded(name, dtype), torch.Generator().manual_seed(0)
        prompts = random_prompts(model, tokens, 1, generator=generator)
        missing = [one for one in self.cells if (one.model, one.dtype, one.tokens) == (name, dtype, tokens)]
        missing = [one for one in missing if not (self.folder / f"{one.name}.jsonl").exists()]
        made = {one: pruner for one in missing if (pruner := _placed(one, model)) is not None}
        pruners, rounds = list(made.values()), max(PAIRS, min(MOST, PAIRS * SHORT // tokens))
        rows = timed(model, pruners, prompts, rounds, generator, settled=tokens < SHORT)
        clock = BlockClock(model, prompts, clock=time.process_time)
        limits = [shape_limit(clock, row["dense_ms"], p.trace.routed, p.kv) for row, p in zip(rows, pruners)]
        return {one: row | {"shape_limit": limit} for one, row, limit in zip(made, rows, limits, strict=True)}
