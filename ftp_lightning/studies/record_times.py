"""How long the methods of the record take to the first token, beside what their FLOPs allow."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ftp_lightning.studies.grid import Cell

if TYPE_CHECKING:
    from pandas import DataFrame

    from ftp_lightning.studies.record_study import RecordStudy

PAIRS = 15
"""Pairs of dense and pruned prefills."""


@dataclass(frozen=True)
class Timed(Cell):
    """One method on one random prompt of so many tokens; `method` as in `record_study`."""

    model: str
    tokens: int
    method: str


@dataclass(frozen=True)
class RecordTimes:
    """Measures cells with the pruners of a `RecordStudy`, by the processor time of this thread."""

    study: RecordStudy

    def measure(self, cell: Timed) -> DataFrame:
        """One row: dense / pruned with its 95 % interval, both medians in milliseconds, and the limit of the FLOPs."""
        from pandas import DataFrame

        from ftp_lightning.costs.flops import realised_flops
        from ftp_lightning.costs.request import scout_flops
        from ftp_lightning.evaluation.speed.prefill import prefill_speed
        from ftp_lightning.evaluation.speed.prompts import random_prompts

        model, generator = self.study.loaded(cell.model)[0], torch.Generator().manual_seed(0)
        pruner = self.study.pruner(cell.model, cell.method)
        prompts = random_prompts(model, cell.tokens, 1, generator=generator)
        found = prefill_speed(model, pruner, prompts, PAIRS, generator=generator, clock=time.process_time)
        trace, ratio = pruner.trace.routed, found.ratio
        dense, left = realised_flops(model, trace, pruner.kv, rank=pruner.skip_rank, last_only=trace.last_only)
        left += scout_flops(model, pruner.router.needs.scout, cell.tokens)
        row = {"speedup": ratio.value, "low": ratio.low, "high": ratio.high, "flops_limit": dense / left}
        return DataFrame([row | {"dense_ms": found.dense_ms, "pruned_ms": found.pruned_ms, "pairs": found.pairs}])


def times_table(items: DataFrame) -> str:
    """Markdown, one row per method and length: measured speed-up, and the share of the FLOPs limit that it reaches."""
    lines = ["| method | tokens | times as fast [95 %] | FLOPs limit | of the limit |", "|---|---|---|---|---|"]
    for row in items.itertuples():
        measured = f"{row.speedup:.2f} [{row.low:.2f}, {row.high:.2f}]"
        share = row.speedup / row.flops_limit
        lines.append(f"| {row.method} | {row.tokens:,} | {measured} | {row.flops_limit:.2f} | {share:.2f} |")
    return "\n".join(lines)
