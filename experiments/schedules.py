"""Which way of spreading a budget over the blocks keeps most, and what does each way cost?

    python experiments/schedules.py --model NAME --data CALIBRATION --test TEST
    python experiments/schedules.py --tables                                  # the tables of what is finished

The static router runs under every schedule. All schedules of a column save the same share of a prompt's FLOPs, exactly
where blocks cost alike. `searched` starts from the allocations and from the measured sensitivity.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from ftp_lightning import Schedule, StaticRouter, TokenPruner
from ftp_lightning.lock import locked
from ftp_lightning.studies.recall_study import Seeded, calibration, recall_study, searched

SEARCHED = "searched"
WAYS = ("uniform", "first_dense", "late", "ramp", "block_influence", "gradient", "sensitivity", SEARCHED)


def find(args: argparse.Namespace, cell: Seeded) -> tuple[TokenPruner, dict[str, Any]]:
    """The static router under the schedule, and the forward tokens that its search took."""
    from ftp_lightning.stages.sensitivity import SensitivityStage

    measured = args.output / f"sensitivity-{cell.kv}-{cell.seed}"
    with locked(measured):
        SensitivityStage(**calibration(args, cell), output=str(measured)).execute()
    named = {} if cell.method == SEARCHED else {"allocations": (cell.method,), "generations": 0}
    found = searched(
        args, cell, args.output / f"search-{cell.name}", sensitivity=str(measured / "sensitivity.json"), **named
    )
    tokens = json.loads((found / "metrics.json").read_text())["generations"][-1]["forward_tokens"]
    return TokenPruner(StaticRouter(), Schedule.load(found / "schedule.json")), {"forward_tokens": tokens}


if __name__ == "__main__":
    recall_study(__doc__, "runs/schedules", WAYS, find)
