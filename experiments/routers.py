"""Does a trained router beat the static one, and what does it have to see?  python experiments/routers.py --help

For every (kv, budget, seed) each method ends in a router and a schedule, and is measured on test text and on questions
that need something far back in the prompt (as experiments/budgets.py measures them), and on windows of test text as the
searches have them.

* static, searched: the static router under the schedule found for it (`--static`, from experiments/schedules.py:
  about a million forward tokens), or searched here.
* paper: the four factors, guide to the static router over a quarter of the steps, trained under that schedule; then the
  schedule is fine-tuned with the trained router.
* factors, projected (and their variants): first trained under a schedule that leaves `--dense` first blocks dense and
  is uniform else, where every block has something to decide; then the schedule is searched with the trained router;
  then trained again, where that lowers the validation KL. `projected` sees 12 directions of the hidden state beside the
  factors; compensated: a skipped token gets a fitted map of rank 8 of its state. Guide
  "future": the tokens that the continuation attends to.
* projected, trained on: what `projected` ended with, trained for three times the steps once more, its schedule kept.
* projected once: as `projected`, but tokens are ranked once for all blocks; as static: it is trained under the static
  router's schedule, for three times the steps, and that schedule stays.

A training step costs about four forwards of its rows (teacher, student, backward). What is finished is not done again.
`--worker I/N` takes every N-th cell; `--methods` does only those; `--tables` only writes the tables.
"""

import argparse
import functools
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import budgets as study
import schedules as searches

FUTURE = {"guide": "future", "guide_share": 1.0, "guide_decay": "constant"}
METHODS = {
    "static, searched": {},
    "paper": {"router": "dynamic", "start": "static"},
    "factors": {"router": "dynamic"} | FUTURE,
    "projected": {"router": "projected"} | FUTURE,
    "projected, guide static": {"router": "projected"},
    "projected, trained once": {"router": "projected", "again": False} | FUTURE,
    "projected, from static": {"router": "projected", "start": "static"} | FUTURE,
    "projected once": {"router": "projected_once"} | FUTURE,
    "projected once, as static": {"router": "projected_once", "start": "static", "search": False, "longer": 3} | FUTURE,
    "projected, trained on": {"from": "projected", "longer": 3} | FUTURE,
    "projected, compensated": {"router": "projected", "skip": 8} | FUTURE,
    "hidden+factors": {"router": "hidden+factors"} | FUTURE,
}
"""Name -> router, first schedule, and what differs from the training's defaults."""


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument(
        "--calibration", default="embedded", help="text to train and search on; used whole unless embedded"
    )
    parser.add_argument("--validation", default="embedded", help="text that the best state is chosen on")
    parser.add_argument("--test", action="append", metavar="NAME=SOURCE", help="test text, also of the questions")
    parser.add_argument("--static", type=Path, default=Path("experiments/found/schedules"))
    parser.add_argument("--budgets", default="0.3,0.6")
    parser.add_argument("--kv", default="keep,evict")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=250_000, help="forward tokens of a search")
    parser.add_argument("--calibration_windows", type=int, default=32)
    parser.add_argument("--dense", type=int, default=2, help="first blocks that are dense in the first training")
    parser.add_argument("--items", type=int, default=700, help="recall questions per seed")
    parser.add_argument("--windows", type=int, default=64, help="windows of test text per seed")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", default="; ".join(METHODS), help="separated by ;")
    parser.add_argument("--output", type=Path, default=Path("runs/routers"))
    parser.add_argument("--worker", default="0/1")
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    args.methods = study.chosen(parser, args.methods, METHODS)
    return args


class Cell:
    """One kv mode, budget and seed: text, training and search."""

    def __init__(self, args, kv, budget, seed):
        from ftp_lightning.models import load

        self.args, self.kv, self.budget, self.seed = args, kv, budget, seed
        self.model, self.tokenizer = load(args.model, dtype=args.dtype)
        self.blocks = self.model.config.num_hidden_layers

    def windows(self, source, part, count, seed):
        return study.search_windows(self.tokenizer, source, part, count, seed)

    @functools.cached_property
    def calibration(self):
        return self.windows(self.args.calibration, "calibration", self.args.calibration_windows, self.seed)

    @functools.cached_property
    def validation(self):
        return self.windows(self.args.validation, "validation", 24, 200 + self.seed)

    @functools.cached_property
    def static(self):
        """The schedule that was found for the static router, or is searched here with as many forward tokens as the
        others take for two trainings and a search."""
        from ftp_lightning import Schedule, StaticRouter, TokenPruner
        from ftp_lightning.search.allocations import late, ramp, step, uniform

        path = self.args.static / f"{self.kv}-{self.budget}-{self.seed}.json"
        if path.exists():
            return Schedule(json.loads(path.read_text())["ours"]["sparsity"])
        seeds = {made.__name__: made(self.blocks, self.budget) for made in (uniform, ramp, step, late)}
        pruner = TokenPruner(StaticRouter(), seeds["uniform"], kv=self.kv)
        training = 2 * 4 * self.args.steps * 4 * (192 + 64)  # two of them, four forwards a step, four rows each
        return self.searched(pruner, seeds, self.args.tokens + training).schedule

    def trained(self, pruner, folder, rounds, **settings):
        """The pruner with its router trained under its schedule, on rows of its own in every round."""
        from ftp_lightning.lit.fitting import fit_router
        from ftp_lightning.lit.training_settings import TrainingSettings

        steps = self.args.steps * settings.pop("longer", 1)
        settings = TrainingSettings(steps=steps, validations=3, seed=self.seed, **settings)
        count = settings.steps * settings.batch_size
        rows = self.windows(self.args.calibration, "training", count * (rounds + 1), 100 + self.seed)
        rows = rows.subset(range(count * rounds, count * (rounds + 1)))
        return fit_router(self.model, pruner, rows, self.validation, settings, folder)

    def searched(self, pruner, seeds, tokens=None):
        """The pruner under the best schedule for its router."""
        from ftp_lightning.search.fitness import ContinuationFitness
        from ftp_lightning.search.genetic import genetic_search
        from ftp_lightning.search.settings import SearchSettings

        fitness = ContinuationFitness(
            self.model, self.calibration, pruner.with_schedule, max(1, len(self.calibration) // 4)
        )
        limits = {"generations": 10**6, "max_forward_tokens": tokens or self.args.tokens}
        settings = SearchSettings(budget=self.budget, seed=self.seed, **limits)
        return pruner.with_schedule(genetic_search(fitness, self.blocks, settings, seeds).schedule)

    def compensated(self, rank):
        """What the pruner is told of skipped tokens: the identity, or the low-rank map of that rank, fitted here."""
        from ftp_lightning import fit_compensation

        if rank is None:
            return {}
        windows = self.windows(self.args.calibration, "training", 64, 300 + self.seed)
        return {"skip": "low-rank", "compensation": fit_compensation(self.model, windows, rank)}

    def find(self, name, folder):
        """The pruner of one method, and the validation KL of its trainings."""
        import torch

        from ftp_lightning import StaticRouter, TokenPruner, make_router
        from ftp_lightning.search.allocations import ramp, step

        settings = dict(METHODS[name])
        if not settings:
            return TokenPruner(StaticRouter(), self.static, kv=self.kv), []
        if earlier := settings.pop("from", None):
            pruner = TokenPruner.load(folder_of(self.args, self.kv, self.budget, self.seed, earlier) / "pruned")
            return pruner, [self.trained(pruner, folder, 2, **settings)["validation_kl"]]
        router, start = settings.pop("router"), settings.pop("start", "step")
        again, search = settings.pop("again", start == "step"), settings.pop("search", True)
        first = self.static if start == "static" else step(self.blocks, self.budget, self.args.dense)
        torch.manual_seed(self.seed)
        made = make_router(router, self.blocks, self.model.config.hidden_size)
        pruner = TokenPruner(made, first, kv=self.kv, **self.compensated(settings.pop("skip", None)))
        curves = [self.trained(pruner, folder / "0", 0, **settings)["validation_kl"]]
        if not search:
            return pruner, curves
        seeds = {"first": first, "ramp": ramp(self.blocks, self.budget), "step": step(self.blocks, self.budget)}
        pruner = self.searched(pruner, seeds)
        if again:
            curves.append(self.trained(pruner, folder / "1", 1, **settings)["validation_kl"])
        return pruner, curves


def run(args):
    for cell in searches.cells_of(args):
        run_cell(args, *cell)


def run_cell(args, kv, budget, seed):
    target, known = study.cell_file(args, kv, budget, seed)
    if all(name in known for name in args.methods):
        return
    cell = Cell(args, kv, budget, seed)
    test, held = searches.tests_for(args, seed)
    for name in args.methods:
        if name in known:
            continue
        folder = folder_of(args, kv, budget, seed, name)
        pruner, curves = cell.find(name, folder)
        row = test.measure(pruner) | {part: held.measure(part, pruner) for part in searches.HELD}
        row |= {"sparsity": list(pruner.schedule.sparsity), "validation": curves}
        row["parameters"] = pruner.router.parameter_count
        pruner.save(folder / "pruned")
        known[name] = searches.compact(row)
        study.write(target, known)
        print(
            f"{kv} {budget:.0%} seed {seed} {name}: held out {row['held']['kl']:.4f}, kept {row['kept']['share']:.3f}, "
            f"{[[round(one['kl'], 4) for one in curve] for curve in curves]}",
            flush=True,
        )


def folder_of(args, kv, budget, seed, name):
    return args.output / f"{kv}-{budget}-{seed}-{study.place_of(name)}"


def table(args, kv, budget):
    """Markdown: each method, mean and std over the seeds that have it; it minus static, paired."""
    cells = [json.loads(path.read_text()) for path in sorted(args.output.glob(f"{kv}-{budget}-*.json"))]
    if not cells:
        return
    print(f"\n### {budget:.0%}, `{kv}`\n")
    print(
        "| router | seeds | parameters | held-out KL | KL at twice the length | KL of prose | kept, % | FLOPs cut "
        "| it - static: held-out KL | it - static: kept, points |"
    )
    print("|---" * 10 + "|")
    for name in METHODS:
        having = [cell for cell in cells if name in cell and "static, searched" in cell]
        if having:
            print(f"| {name} | {len(having)} | {' | '.join(table_row(having, name))} |")


def table_row(cells, name, other="static, searched"):
    rows = [cell[name] for cell in cells]
    shown = [f"{rows[0]['parameters']:,}"]
    shown += [
        study.mean_std(list(column), 4) for column in zip(*([r["held"]["kl"], r["long"]["kl"], r["kl"]] for r in rows))
    ]
    shown.append(study.mean_std([100 * row["kept"]["share"] for row in rows], 1))
    shown.append(study.mean_std([100 * row["flops_cut"] for row in rows], 1))
    return [*shown, *(["", ""] if name == other else searches.paired(cells, name, other))]


def main():
    args = arguments()
    if not args.tables:
        run(args)
    for budget, kv in itertools.product(map(float, args.budgets.split(",")), args.kv.split(",")):
        table(args, kv, budget)


if __name__ == "__main__":
    main()
