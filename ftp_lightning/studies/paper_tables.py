"""The tables of the FTP paper (arXiv 2412.11494) for a model measured here, made from finished stages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ftp_lightning.cli.settings import StageSettings
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation import quoted
from ftp_lightning.evaluation.tables import Record, Table, fixed, number, percent, text, with_interval, written
from ftp_lightning.products import read_product

INPUTS: dict[str, dict[str, Any]] = {
    "hidden": {"router": "hidden"},
    "hidden+factors": {"router": "hidden+factors"},
    "without_position": {"factors": ("attention", "rank", "sparsity")},
    "without_attention": {"factors": ("position", "rank", "sparsity")},
    "without_rank": {"factors": ("position", "attention", "sparsity")},
    "without_sparsity": {"factors": ("position", "attention", "rank")},
}
"""What the router of table 5 sees: name -> settings of its training. `all four` is the trained router itself."""
OURS, BEFORE = "FTP (ours)", "dynamic (before fine-tuning)"
METHODS = {
    "random tokens": "random",
    "uniform, static router": "uniform",
    "Block Influence, static router": "block_influence",
    "searched, static router": "static",
    "dynamic, before fine-tuning": BEFORE,
    OURS: None,
}
"""As the tables call a method -> its name in results.json; None: the last one."""


REQUESTS = {"arc_challenge": (1172, 40), "arc_easy": (2376, 35), "hellaswag": (10042, 90), "mmlu": (14042, 750),
            "winogrande": (2534, 28)}  # fmt: skip
"""Distinct contexts and their mean tokens under the declared shots (WinoGrande: two contexts an item)."""


def middle_of(budgets: Sequence[float]) -> float:
    """The budget of tables 3 to 5: the one nearest to 30 %."""
    return min(budgets, key=lambda budget: abs(budget - 0.3))


def carry_out(args: argparse.Namespace, stages: Mapping[str, StageSettings]) -> None:
    """Say what the stages take, or run them and write the tables. Leaves with status 2 on a UserError."""
    from ftp_lightning.__main__ import hush
    from ftp_lightning.whole_files import write_text

    hush()
    try:
        if args.dry or args.estimate:
            return _say(args, stages)
        if not args.tables:
            _check(args, stages)
            for place, stage in stages.items():
                print(f"== {place}", flush=True)
                stage.execute()
        files = written(paper_tables(args, stages))
        for name, content in files.items():
            write_text(args.output / name, content)
        print(files["tables.md"])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _say(args: argparse.Namespace, stages: Mapping[str, StageSettings]) -> None:
    """Print the command of every stage, and what all of a kind take on devices of the size that --estimate gives."""
    from ftp_lightning import models
    from ftp_lightning.cli.estimate import devices
    from ftp_lightning.estimate import NEEDS, Need, Shape, empty_model, evaluate_need, rate

    if args.dry:
        print(*(f"{place}: {stage.command()}" for place, stage in stages.items()), sep="\n")
    if not args.estimate:
        return
    count, gigabytes = devices(args.estimate)
    shape = Shape.of(empty_model(models.load_config(args.model), models.DTYPES[args.dtype]))
    sums: dict[str, Any] = NEEDS | {"evaluate": partial(evaluate_need, windows=1000, known=REQUESTS)}
    needs: dict[str, list[Need]] = {}
    for stage in stages.values():
        if stage.stage in sums:
            needs.setdefault(stage.stage, []).append(sums[stage.stage](shape, stage))
    hours = {kind: sum(need.seconds(count, gigabytes) for need in found) / 3600 for kind, found in needs.items()}
    print(f"{args.model}, {len(stages)} stages on {count} x {rate(gigabytes)[0]} of {gigabytes} GB:")
    for kind, found in needs.items():
        print(f"  {kind}: {hours[kind]:.1f} hours, {max(need.memory for need in found) / 1e9:.1f} GB")
    print(f"  in all {sum(hours.values()):.1f} hours; loading, timing and the Hub not counted")


def _check(args: argparse.Namespace, stages: Mapping[str, StageSettings]) -> None:
    """UserError for tasks and lengths that cannot be measured, before hours of search."""
    from ftp_lightning import models
    from ftp_lightning.evaluation.harness.tasks import load_tasks
    from ftp_lightning.stages.evaluate import EvaluateStage
    from ftp_lightning.stages.inputs import check_positions
    from ftp_lightning.stages.task_files import check_tasks, local_files

    check_tasks(args.tasks.split(","))
    if files := local_files(next(one for one in stages.values() if isinstance(one, EvaluateStage))):
        load_tasks(files)
    if "6" in args.only.split(","):
        longest = max(map(int, args.lengths.split(",")))
        check_positions(models.load_config(args.model), longest, "prompts of table 6", "Give shorter --lengths.")


def paper_tables(args: argparse.Namespace, stages: Mapping[str, StageSettings]) -> list[Table]:
    """The tables of --only, the paper's numbers in their last rows."""
    budgets = [float(budget) for budget in args.budgets.split(",")]
    lowest, middle = f"{min(budgets)}/evaluate", f"{middle_of(budgets)}/evaluate"
    routers = [name for name in METHODS if not name.startswith(("uniform", "Block"))]
    spread = [(f"{name}, dynamic", f"allocation/{name}/evaluate", None) for name in ("uniform", "block_influence")]
    seen = [(name.replace("_", " "), f"inputs/{name}/evaluate", None) for name in INPUTS]
    told: dict[str, tuple[str, list[tuple[str, str, str | None]], list[Record]]] = {
        "1": (f"Methods at {min(budgets):.0%}", [(name, lowest, METHODS[name]) for name in METHODS], [*quoted.MAIN]),
        "2": ("By sparsity", [(OURS, f"{budget}/evaluate", None) for budget in budgets], [*quoted.BY_SPARSITY]),
        "3": ("Routers", [(name, middle, METHODS[name]) for name in routers], [*quoted.ROUTERS]),
        "4": (
            "Allocation",
            [*spread, ("GA, dynamic before fine-tuning", middle, BEFORE), ("GA + fine-tune", middle, None)],
            [*quoted.ALLOCATION],
        ),
        "5": ("Router input", [*seen, ("all four", middle, BEFORE)], [*quoted.FACTORS]),
    }
    only = args.only.split(",")
    made = [_table(args, f"table{key}", *about) for key, about in told.items() if key in only]
    return [*made, _speed_table(args, stages)] if "6" in only else made


def _table(
    args: argparse.Namespace, name: str, title: str, cells: list[tuple[str, str, str | None]], quotes: list[Record]
) -> Table:
    tasks = args.tasks.split(",")
    results = {place: read_product(args.output / place, "results.json") for _, place, _ in cells}
    rows = [{"method": shown} | _row(args.model, results[place], method, tasks) for shown, place, method in cells]
    columns = {
        "model": text("model"),
        "method": text("method"),
        "sparsity, %": percent("sparsity"),
        "realised, %": percent("realised"),
        "FLOPs cut, %": percent("flops_cut"),
        "retention, % [95 %]": with_interval("retention", "retention_low", "retention_high", 1.0),
        "KL": number("kl"),
        **{f"{task}, %": percent(task) for task in tasks},
        "source": text("source"),
    }
    counted = results[cells[0][1]]["counted"]
    over = f"Retention over {', '.join(counted)}." if counted else "No task measures anything: no retention."
    return Table(name, title, columns, [*rows, *quotes], (over, "Quoted: Li et al. 2024, not measured here."))


def _row(model: str, results: dict[str, Any], name: str | None, tasks: Sequence[str]) -> dict[str, Any]:
    """One method of an evaluation; empty where it was not measured."""
    own = [method for method in results["methods"] if name in (None, method["name"])]
    if not own:
        return {}
    found = own[-1]
    low, high = found["retention_interval"] or (None, None)
    about = {"model": model, "sparsity": found["budget"], "realised": found["realised_sparsity"], "source": "measured"}
    about |= {"flops_cut": found["flops_reduction"], "kl": found["kl"]["mean"]}
    about |= {"retention": found["retention"], "retention_low": low, "retention_high": high}
    return about | {task: found["tasks"].get(task, {}).get("acc") for task in tasks}


def _speed_table(args: argparse.Namespace, stages: Mapping[str, StageSettings]) -> Table:
    rows = []
    for place in (place for place in stages if place.endswith("/benchmark")):
        about = {"model": args.model, "method": OURS, "sparsity": float(Path(place).parent.name), "source": "measured"}
        rows += [about | row for row in read_product(args.output / place, "benchmark.json")["rows"]]
    columns = {
        "model": text("model"),
        "method": text("method"),
        "sparsity, %": percent("sparsity"),
        "prompt tokens": text("length"),
        "prefill speed-up": fixed("speedup", 2),
        "from": fixed("low", 2),
        "to": fixed("high", 2),
        "FLOPs allow": fixed("flops_limit", 2),
        "source": text("source"),
    }
    return Table("table6", "Prefill time", columns, [*rows, *quoted.SPEED], ("Other hardware than the paper's.",))
