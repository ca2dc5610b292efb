"""The paper's tables for any model, with its own numbers beside them as quoted.  make reproduce MODEL=NAME_OR_FOLDER

    python experiments/reproduce.py --model NAME [--task_data DIR] [--estimate] [--limit N] [--tables 1,4]

Tables: 1 methods at 22 %; 2 sparsity 22 to 40 %; 3 routers, 4 allocation and 5 router inputs at 30 %; 6 prefill time.
In this numbering 4 and 5 are the paper's; the others are what its text and tables report, by question. Every cell is a
stage (`sensitivity`, `search`, `train`, `evaluate`, `benchmark`) in a folder of its own: what is finished is not done
again, and an interrupted run goes on. --estimate prints GPU hours and memory and stops; so does --dry with the cells.
--tasks adds others, ruler and longbench among them (Hub; RULER makes its texts with the model's tokenizer).
"""

import argparse
import json
import sys
from pathlib import Path

BUDGETS = (0.22, 0.30, 0.40)
MIDDLE = 0.30
INPUTS = {
    "hidden": {"router": "hidden"},
    "hidden+factors": {"router": "hidden+factors"},
    "without position": {"factors": ("attention", "rank", "sparsity")},
    "without attention": {"factors": ("position", "rank", "sparsity")},
    "without rank": {"factors": ("position", "attention", "sparsity")},
    "without sparsity": {"factors": ("position", "attention", "rank")},
}
"""Table 5: what the router sees, under the schedule of the static search; "all four" is the trained router itself."""


def arguments(words=None):
    from ftp_lightning.evaluation.harness.declared import PAPER

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="embedded", help="text to calibrate on")
    parser.add_argument("--train_data", help="text or examples to train the router on; the paper's is Alpaca")
    parser.add_argument("--tasks", default=",".join(PAPER))
    parser.add_argument("--task_data", help="folder of the tasks' files; else the Hub")
    parser.add_argument("--kv", default="evict", choices=("evict", "keep"), help="the paper's is evict")
    parser.add_argument("--mode", default="prompt", choices=("prompt", "sequence", "both"), help="paper: sequence")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--tables", default="1,2,3,4,5,6")
    parser.add_argument("--lengths", default="1000,2000", help="prompts of table 6")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--limit", type=int, help="items per task")
    parser.add_argument("--num_fewshot", type=int)
    parser.add_argument("--windows", type=int, help="windows of test text")
    parser.add_argument("--search_windows", type=int, default=32)
    parser.add_argument("--generations", type=int, default=15)
    parser.add_argument("--offspring", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--estimate", action="store_true")
    parser.add_argument("--dry", action="store_true", help="print the cells and stop")
    return parser.parse_args(words)


class Plan:
    """The stages of all cells, by the place of their folder, in an order in which each finds what it reads."""

    def __init__(self, args):
        self.args, self.stages = args, {}
        self.tables = set(args.tables.split(","))
        self.budgets = tuple(map(float, args.budgets.split(",")))
        self.middle = min(self.budgets, key=lambda budget: abs(budget - MIDDLE))
        self._common()
        for budget in self._wanted():
            self._chain(budget)
        if "4" in self.tables:
            self._allocation()
        if "5" in self.tables:
            self._inputs()
        if "6" in self.tables:
            self._speed()

    def _wanted(self):
        """Budgets whose whole chain a table asks for."""
        lowest = {min(self.budgets)} if "1" in self.tables else set()
        middle = {self.middle} if self.tables & {"3", "4", "5", "6"} else set()
        return sorted(set(self.budgets) if "2" in self.tables else lowest | middle)

    def at(self, place):
        return str(self.args.output / place)

    def add(self, kind, place, **more):
        args = self.args
        shared = {"model": args.model, "dtype": args.dtype, "device": args.device, "seed": args.seed}
        more = {"data": args.data, "tracking": "none", **more}
        self.stages[place] = kind(**shared | more, output=self.at(place))

    def _common(self):
        from ftp_lightning.stages.sensitivity import SensitivityStage

        self.add(SensitivityStage, "sensitivity", kv=self.args.kv, windows=min(16, self.args.search_windows))

    def _chain(self, budget):
        """Static search, training, fine-tuning, evaluation beside the baselines."""
        from ftp_lightning.stages.search import SearchStage

        schedule, trained = self.at(f"{budget}/search/schedule.json"), self.at(f"{budget}/train/pruned")
        search = {"kv": self.args.kv, "sensitivity": self.at("sensitivity/sensitivity.json"), "budget": budget}
        search |= {name: getattr(self.args, name) for name in ("generations", "offspring")}
        search["windows"] = self.args.search_windows
        self.add(SearchStage, f"{budget}/search", **search)
        self._train(f"{budget}/train", schedule=schedule, kv=self.args.kv)
        self.add(SearchStage, f"{budget}/finetune", **search | {"pruned": trained, "schedule": schedule})
        compare = ("random", "uniform", "block_influence", "static")
        more = {"compare": compare, "before": trained, "static_schedule": schedule}
        more["sensitivity"] = self.at("sensitivity/sensitivity.json")
        self._evaluate(f"{budget}/evaluate", pruned=self.at(f"{budget}/finetune/pruned"), **more)

    def _train(self, place, **more):
        from ftp_lightning.stages.train import TrainStage

        data = self.args.train_data or self.args.data
        self.add(TrainStage, place, **{"data": data, "steps": self.args.steps, **more})

    def _evaluate(self, place, **more):
        from ftp_lightning.stages.evaluate import EvaluateStage

        names = ("task_data", "mode", "limit", "num_fewshot", "windows", "batch_size")
        asked = {name: getattr(self.args, name) for name in names}
        asked |= {"tasks": tuple(self.args.tasks.split(",")), "answers": self.at("answers")}
        self.add(EvaluateStage, place, **asked | more)

    def _allocation(self):
        """The trained router under schedules that were not fine-tuned for it: uniform, and by Block Influence."""
        pruned = self.at(f"{self.middle}/train/pruned")
        for name in ("uniform", "block_influence"):
            self._evaluate(f"allocation/{name}", pruned=pruned, schedule=self.at(f"allocation/{name}.json"))

    def _inputs(self):
        schedule = self.at(f"{self.middle}/search/schedule.json")
        for name, router in INPUTS.items():
            place = f"inputs/{name.replace(' ', '_').replace('+', '_')}"
            self._train(f"{place}/train", schedule=schedule, kv=self.args.kv, **router)
            self._evaluate(f"{place}/evaluate", pruned=self.at(f"{place}/train/pruned"))

    def _speed(self):
        from ftp_lightning.stages.benchmark import BenchmarkStage

        lengths = tuple(map(int, self.args.lengths.split(",")))
        for budget in self._wanted():
            pruned = self.at(f"{budget}/finetune/pruned")
            self.add(BenchmarkStage, f"{budget}/benchmark", lengths=lengths, pairs=self.args.pairs, pruned=pruned)

    def carry_out(self):
        for place, settings in self.stages.items():
            print(f"== {place}", flush=True)
            if place.startswith("allocation/"):
                self._write_schedule(place.split("/")[1])
            settings.execute()

    def _write_schedule(self, name):
        from ftp_lightning import Schedule
        from ftp_lightning.search.allocations import from_importance

        influence = json.loads(Path(self.at("sensitivity/sensitivity.json")).read_text())["block_influence"]
        uniform = Schedule.uniform(len(influence), self.middle)
        schedule = uniform if name == "uniform" else from_importance(influence, self.middle)
        path = Path(self.at(f"allocation/{name}.json"))
        path.parent.mkdir(parents=True, exist_ok=True)
        schedule.save(path)


# ---------------------------------------------------------------- tables


def method(plan, place, name=None):
    """The record of a method in an evaluation, by default the last; retention with its interval."""
    found = json.loads(Path(plan.at(f"{place}/results.json")).read_text())
    record = next((m for m in found["methods"] if m["name"] == name), None) if name else found["methods"][-1]
    if record is None:
        return {}
    low, high = record["retention_interval"] or (None, None)
    scores = {task: record["tasks"].get(task, {}).get("acc") for task in plan.args.tasks.split(",")}
    kept = record["kept"]["share"] if record["kept"] else None
    return {
        "model": plan.args.model,
        "sparsity": record["budget"],
        "realised": record["realised_sparsity"],
        "flops_cut": record["flops_reduction"],
        "retention": record["retention"],
        "retention_low": low,
        "retention_high": high,
        "kl": record["kl"]["mean"],
        "kept": kept,
        **scores,
        "source": "measured",
    }


def rows_of(plan, cells):
    """cells: (shown, place, method's name or None)."""
    return [{"method": shown} | method(plan, place, name) for shown, place, name in cells]


BASELINES = {
    "random tokens": "random",
    "uniform, static router": "uniform",
    "Block Influence, static router": "block_influence",
    "searched, static router": "static",
    "dynamic, before fine-tuning": "dynamic (before fine-tuning)",
    "FTP (ours)": None,
}


def tables(plan):
    from ftp_lightning.evaluation import quoted

    made, lowest, middle = [], min(plan.budgets), f"{plan.middle}/evaluate"
    every = [(shown, name) for shown, name in BASELINES.items()]
    if "1" in plan.tables:
        rows = rows_of(plan, [(shown, f"{lowest}/evaluate", name) for shown, name in every])
        made.append(shown_table(plan, "table1", f"Methods at {lowest:.0%}", rows, quoted.MAIN))
    if "2" in plan.tables:
        cells = [("FTP (ours)", f"{budget}/evaluate", None) for budget in plan.budgets]
        made.append(shown_table(plan, "table2", "By sparsity", rows_of(plan, cells), quoted.BY_SPARSITY))
    if "3" in plan.tables:
        cells = [(shown, middle, name) for shown, name in every if shown in ROUTERS]
        made.append(shown_table(plan, "table3", f"Routers at {plan.middle:.0%}", rows_of(plan, cells), quoted.ROUTERS))
    if "4" in plan.tables:
        cells = [(f"{name}, dynamic", f"allocation/{name}", None) for name in ("uniform", "block_influence")]
        cells += [("GA, dynamic before fine-tuning", middle, "dynamic (before fine-tuning)")]
        rows = rows_of(plan, [*cells, ("GA + fine-tune", middle, None)])
        made.append(shown_table(plan, "table4", f"Allocation at {plan.middle:.0%}", rows, quoted.ALLOCATION))
    if "5" in plan.tables:
        names = {name: name.replace(" ", "_").replace("+", "_") for name in INPUTS}
        cells = [(name, f"inputs/{place}/evaluate", None) for name, place in names.items()]
        rows = rows_of(plan, [*cells, ("all four", middle, "dynamic (before fine-tuning)")])
        made.append(shown_table(plan, "table5", f"Router input at {plan.middle:.0%}", rows, quoted.FACTORS))
    return [*made, speed_table(plan)] if "6" in plan.tables else made


ROUTERS = ("random tokens", "searched, static router", "dynamic, before fine-tuning", "FTP (ours)")


def shown_table(plan, name, title, rows, quotes):
    from ftp_lightning.evaluation.tables import Table, number, percent, text, with_interval

    columns = {
        "model": text("model"),
        "method": text("method"),
        "sparsity, %": percent("sparsity"),
        "realised, %": percent("realised"),
        "FLOPs cut, %": percent("flops_cut"),
        "retention, % [95 %]": with_interval("retention", "retention_low", "retention_high", 1.0),
        "KL": number("kl"),
        **{f"{task}, %": percent(task) for task in plan.args.tasks.split(",")},
        "source": text("source"),
    }
    counted = json.loads(Path(plan.at(f"{plan._wanted()[0]}/evaluate/results.json")).read_text())["counted"]
    over = (
        f"Retention over {', '.join(counted)}." if counted else "No task measures anything on this model: no retention."
    )
    return Table(name, title, columns, [*rows, *quotes], (over, "Quoted: Li et al. 2024, not measured here."))


def speed_table(plan):
    from ftp_lightning.evaluation import quoted
    from ftp_lightning.evaluation.tables import Table, fixed, percent, text

    rows = []
    for budget in plan._wanted():
        found = json.loads(Path(plan.at(f"{budget}/benchmark/benchmark.json")).read_text())
        for row in found["rows"]:
            names = ("length", "speedup", "low", "high", "flops_limit")
            about = {"model": plan.args.model, "method": "FTP (ours)", "sparsity": budget, "source": "measured"}
            rows.append(about | {name: row.get(name) for name in names})
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


# ---------------------------------------------------------------- estimate

REQUESTS = {"arc_challenge": (1172, 40), "arc_easy": (2376, 35), "hellaswag": (10042, 90), "mmlu": (14042, 750),
            "winogrande": (2534, 28)}  # fmt: skip
"""Distinct contexts and their mean tokens under the declared shots (WinoGrande: two contexts an item)."""
GIGABYTES = 80
"""Of the device that the estimate speaks of."""


def estimate(plan):
    """Lines: what the stages of this plan take on one device, by `ftp_lightning.estimate`, the tasks as large as they
    are."""
    from functools import partial

    from ftp_lightning import models
    from ftp_lightning.estimate import NEEDS, Shape, empty_model, rate

    args = plan.args
    shape = Shape.of(empty_model(models.load_config(args.model), models.DTYPES[args.dtype]))
    sums = NEEDS | {"evaluate": partial(NEEDS["evaluate"], windows=1000, known=REQUESTS)}
    needs = {}
    for stage in plan.stages.values():
        if stage.stage in sums:
            needs.setdefault(stage.stage, []).append(sums[stage.stage](shape, stage))
    hours = {kind: sum(need.seconds(1, GIGABYTES) for need in found) / 3600 for kind, found in needs.items()}
    memory = {kind: max(need.memory for need in found) / 1e9 for kind, found in needs.items()}
    return [
        f"{args.model}, {len(plan.stages)} stages on one {rate(GIGABYTES)[0]} of {GIGABYTES} GB:",
        *(f"  {kind}: {hours[kind]:.1f} GPU hours, {memory[kind]:.1f} GB" for kind in needs),
        f"  in all {sum(hours.values()):.1f} GPU hours; loading, timing and the Hub not counted",
    ]


def run(args):
    from ftp_lightning.evaluation.harness.tasks import load_tasks
    from ftp_lightning.evaluation.tables import written
    from ftp_lightning.stages.run_inputs import inputs
    from ftp_lightning.stages.task_files import check_tasks, local_files

    plan = Plan(args)
    print("\n".join(estimate(plan)))
    if args.dry:
        print("\n".join(f"{place}: {settings.command()}" for place, settings in plan.stages.items()))
    if args.dry or args.estimate:
        return
    from ftp_lightning import models

    config = models.load_config(args.model)
    check_tasks(args.tasks.split(","))
    files = local_files(next(s for s in plan.stages.values() if type(s).stage == "evaluate"))
    if files:  # data that cannot be had are told of now, not after the searches
        load_tasks(files)
    if "6" in plan.tables:
        longest = max(map(int, args.lengths.split(",")))
        inputs.check_positions(config, longest, "prompts of table 6", "Give shorter --lengths.")
    plan.carry_out()
    from ftp_lightning.artifact import write_text

    for name, content in written(tables(plan)).items():
        write_text(args.output / name, content)
    print((args.output / "tables.md").read_text())


def main():
    from ftp_lightning.__main__ import hush
    from ftp_lightning.errors import UserError

    hush()
    try:
        run(arguments())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
