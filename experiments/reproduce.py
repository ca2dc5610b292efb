"""The paper's tables for any model, with its own numbers beside them as quoted.

    python experiments/reproduce.py --model NAME --task_data DIR             # or: make reproduce MODEL=NAME
    python experiments/reproduce.py --model NAME --estimate 1x80              # what all of it takes, and no more

Tables: 1 methods at the lowest budget; 2 all budgets; 3 routers, 4 allocations and 5 router inputs at 30 %; 6 prefill
time. 4 and 5 are numbered as in the paper. Every row comes from a stage with a folder of its own: run the same command
again to resume. --dry 1 prints the stages.
"""

from __future__ import annotations

import argparse
from typing import Any

from ftp_lightning.cli.settings import StageSettings
from ftp_lightning.stages.benchmark import BenchmarkStage
from ftp_lightning.stages.evaluate import EvaluateStage
from ftp_lightning.stages.search import SearchStage
from ftp_lightning.stages.sensitivity import SensitivityStage
from ftp_lightning.stages.train import TrainStage
from ftp_lightning.studies.grid import arguments
from ftp_lightning.studies.paper_tables import INPUTS, carry_out, middle_of

FLAGS: dict[str, Any] = {
    "model": "embedded", "data": "embedded", "train_data": "", "task_data": "", "dtype": "float32", "device": "auto",
    "tasks": "arc_challenge,arc_easy,hellaswag,mmlu,winogrande", "kv": "evict", "mode": "prompt", "seed": 0,
    "budgets": "0.22,0.3,0.4", "only": "1,2,3,4,5,6", "lengths": "1000,2000", "pairs": 15, "limit": 0, "windows": 0,
    "num_fewshot": -1, "search_windows": 32, "generations": 15, "offspring": 8, "steps": 200, "batch_size": 8,
    "estimate": "", "dry": 0,
}  # fmt: skip


def plan(args: argparse.Namespace) -> dict[str, StageSettings]:
    """Folder below --output -> stage, in the order in which each finds what it reads."""
    found: dict[str, StageSettings] = {}
    names = ("model", "data", "dtype", "device", "seed")
    shared: dict[str, Any] = {name: getattr(args, name) for name in names} | {"tracking": "none"}
    only, budgets = set(args.only.split(",")), [float(budget) for budget in args.budgets.split(",")]
    middle, measured = middle_of(budgets), f"{args.output}/sensitivity/sensitivity.json"
    search: dict[str, Any] = {"windows": args.search_windows, "sensitivity": measured}
    search |= {"generations": args.generations, "offspring": args.offspring}
    training = {"data": args.train_data or args.data, "kv": args.kv, "steps": args.steps}
    asked: dict[str, Any] = {"tasks": tuple(args.tasks.split(",")), "mode": args.mode, "batch_size": args.batch_size}
    asked |= {"task_data": args.task_data or None, "limit": args.limit or None, "windows": args.windows or None}
    asked |= {"answers": f"{args.output}/answers", "sensitivity": measured}
    asked |= {"num_fewshot": args.num_fewshot} if args.num_fewshot >= 0 else {}
    rivals = ("random", "uniform", "block_influence", "static")

    def add(kind: type[StageSettings], place: str, **own: Any) -> str:
        found[place] = kind(**shared | own, output=f"{args.output}/{place}")
        return f"{args.output}/{place}"

    add(SensitivityStage, "sensitivity", kv=args.kv, windows=min(16, args.search_windows))
    wanted = budgets if "2" in only else [min(budgets)] * ("1" in only) + [middle] * bool(only & set("3456"))
    for budget in sorted(set(wanted)):
        schedule = add(SearchStage, f"{budget}/search", kv=args.kv, budget=budget, **search) + "/schedule.json"
        before = add(TrainStage, f"{budget}/train", schedule=schedule, **training) + "/pruned"
        tuned = add(SearchStage, f"{budget}/finetune", pruned=before, schedule=schedule, budget=budget, **search)
        pruner, more = f"{tuned}/pruned", {"compare": rivals, "before": before, "static_schedule": schedule}
        add(EvaluateStage, f"{budget}/evaluate", pruned=pruner, **more, **asked)
        if "6" in only:
            lengths = tuple(map(int, args.lengths.split(",")))
            add(BenchmarkStage, f"{budget}/benchmark", pruned=pruner, lengths=lengths, pairs=args.pairs)
    before = f"{args.output}/{middle}/train/pruned"
    for name in ("uniform", "block_influence") if "4" in only else ():
        own = search | {"allocations": (name,), "generations": 0, "kv": args.kv, "budget": middle}
        schedule = add(SearchStage, f"allocation/{name}/search", **own) + "/schedule.json"
        add(EvaluateStage, f"allocation/{name}/evaluate", pruned=before, schedule=schedule, **asked)
    for name, router in INPUTS.items() if "5" in only else ():
        schedule = f"{args.output}/{middle}/search/schedule.json"
        place = add(TrainStage, f"inputs/{name}/train", schedule=schedule, **training, **router)
        add(EvaluateStage, f"inputs/{name}/evaluate", pruned=f"{place}/pruned", **asked)
    return found


if __name__ == "__main__":
    asked_for = arguments(__doc__, "runs/reproduce", **FLAGS)
    carry_out(asked_for, plan(asked_for))
