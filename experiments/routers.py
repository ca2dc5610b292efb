"""Does a trained router beat the static one under the same schedule, and what does it have to see?

    python experiments/routers.py --model NAME --data CALIBRATION --test TEST
    python experiments/routers.py --tables                                    # the tables of what is finished

For each kv mode, cut and seed a schedule is searched with the static router. Every router is trained under it.
"""

from __future__ import annotations

import argparse
from typing import Any

from ftp_lightning import Schedule, StaticRouter, TokenPruner
from ftp_lightning.studies.recall_study import Seeded, calibration, recall_study, searched

FUTURE = {"guide": "future", "guide_share": 1.0, "guide_decay": "constant"}
"""The guide loss teaches which tokens the continuation attends to, during the whole training."""
ROUTERS: dict[str, dict[str, Any] | None] = {
    "static": None,
    "dynamic": {},
    "dynamic_future": FUTURE,
    "hidden_future": FUTURE | {"router": "hidden+factors"},
    "projected": FUTURE | {"router": "projected"},
    "projected_static_guide": {"router": "projected"},
    "projected_compensated": FUTURE | {"router": "projected", "skip": "low-rank"},
    "projected_once": FUTURE | {"router": "projected_once"},
}
"""Name -> settings of its training, see `TrainStage`; None: nothing is trained."""


def find(args: argparse.Namespace, cell: Seeded) -> tuple[TokenPruner, dict[str, Any]]:
    """The router under the searched schedule, and the number of its parameters."""
    from ftp_lightning.stages.train import TrainStage

    place = args.output / f"schedule-{cell.kv}-{cell.cut}-{cell.seed}"
    schedule, flags = searched(args, cell, place) / "schedule.json", ROUTERS[cell.method]
    if flags is None:
        return TokenPruner(StaticRouter(), Schedule.load(schedule)), {"parameters": 0}
    about = {name: value for name, value in calibration(args, cell).items() if name != "windows"} | flags
    stage = TrainStage(**about, schedule=str(schedule), steps=args.steps, output=str(args.output / cell.name))
    pruner = TokenPruner.load(stage.execute() / "pruned")
    return pruner, {"parameters": pruner.router.parameter_count}


if __name__ == "__main__":
    recall_study(__doc__, "runs/routers", ROUTERS, find, steps=200)
