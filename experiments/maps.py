"""What do fitted and distilled maps for skipped tokens add to a searched schedule?

    python experiments/maps.py --cuts 0.4 --seeds 1

The static router with the schedule that was searched on calibration text of the seed; the same with maps of rank
`--rank` for both parts of a block, fitted by ridge regression on `--rows` windows of training text; the same, distilled
on the KL of the continuation; a quarter of the windows chooses the best epoch.
"""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any

from ftp_lightning import Schedule, StaticRouter, TokenPruner, distil_compensation, fit_compensation
from ftp_lightning.data.rows import Rows
from ftp_lightning.lit.distillation import DistillationSettings
from ftp_lightning.models import load
from ftp_lightning.stages.inputs import measured_rows
from ftp_lightning.stages.search import SearchStage
from ftp_lightning.studies.recall_study import Seeded, recall_study, searched
from ftp_lightning.training.compensation import Compensation

METHODS = ("static", "fitted", "distilled")
RECALL = 0.5


@cache
def loaded(model: str) -> Any:
    return load(model)


@cache
def rows_of(model: str, data: str, seed: int, count: int) -> Rows:
    """Windows of training text, half of them with facts to recall."""
    stage = SearchStage(model=model, data=data, seed=seed)
    found, tokenizer = loaded(model)
    return measured_rows(stage, found, tokenizer, count, RECALL, "training")


def fitted(args: argparse.Namespace, cell: Seeded) -> Compensation:
    rows = rows_of(args.model, args.data, cell.seed, args.rows)
    return fit_compensation(loaded(args.model)[0], rows, rank=args.rank, parts="attention+mlp")


def find(args: argparse.Namespace, cell: Seeded) -> tuple[TokenPruner, dict[str, Any]]:
    place = args.output / "searched" / f"{cell.kv}-{cell.cut}-{cell.seed}"
    schedule = Schedule.load(searched(args, cell, place) / "schedule.json")
    if cell.method == "static":
        return TokenPruner(StaticRouter(), schedule), {}
    about: dict[str, Any] = {"parts": "attention+mlp", "skip": "low-rank"}
    pruner = TokenPruner(StaticRouter(), schedule, compensation=fitted(args, cell), **about)
    if cell.method == "fitted":
        return pruner, {}
    rows = rows_of(args.model, args.data, cell.seed, args.rows)
    teaching = rows.subset(place for place in range(len(rows)) if place % 4)
    checking = rows.subset(range(0, len(rows), 4))
    steps: dict[str, Any] = {"epochs": args.epochs, "batch_size": 4, "accumulate": 1}
    settings = DistillationSettings(**steps, learning_rate=args.rate, seed=cell.seed)
    found = distil_compensation(loaded(args.model)[0], pruner, teaching, checking, settings)
    return pruner.changed(compensation=found), {}


if __name__ == "__main__":
    recall_study(__doc__, "runs/maps", METHODS, find, rank=32, rows=256, epochs=8, rate=0.004)
