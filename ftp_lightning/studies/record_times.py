"""How long the methods of the record take to the first token, beside what their FLOPs allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ftp_lightning.evaluation.speed.prompts import random_prompts
from ftp_lightning.studies.grid import Cell
from ftp_lightning.studies.prefill import PAIRS, timed

if TYPE_CHECKING:
    from pandas import DataFrame

    from ftp_lightning.studies.record_study import RecordStudy


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
        """One row, see `prefill.timed`."""
        from pandas import DataFrame

        model, generator = self.study.loaded(cell.model)[0], torch.Generator().manual_seed(0)
        pruner = self.study.pruner(cell.model, cell.method)
        prompts = random_prompts(model, cell.tokens, 1, generator=generator)
        return DataFrame(timed(model, [pruner], prompts, PAIRS, generator))


def times_table(items: DataFrame) -> str:
    """Markdown, one row per method and length: measured speed-up, and the share of the FLOPs limit that it reaches."""
    lines = ["| method | tokens | times as fast [95 %] | FLOPs limit | of the limit |", "|---|---|---|---|---|"]
    for row in items.itertuples():
        measured = f"{row.speedup:.2f} [{row.low:.2f}, {row.high:.2f}]"
        share = row.speedup / row.flops_limit
        lines.append(f"| {row.method} | {row.tokens:,} | {measured} | {row.flops_limit:.2f} | {share:.2f} |")
    return "\n".join(lines)
