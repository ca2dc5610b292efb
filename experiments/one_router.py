"""Does one router serve every budget as well as one trained for it?  python experiments/one_router.py --help

For every (kv, budget, seed), all under the schedules of one family (`--family`; a budget of `--anchors` that it lacks
is searched with the static router, once, for all seeds):

* static: the static router.
* R, one: a single router of kind R, every forward of its training under a schedule whose budget is drawn from
  `--range`; the same router at every budget.
* R, own: a router trained under the schedule of this budget, on the same rows, with as many steps; a seed has one of
  them for every budget.
* R, one, longer: as `one`, with `--longer` times the steps: as many as all its own together.
* R, transferred: `R, own` of another model, `--transfer FOLDER` (what this script wrote for that model, as far as it
  goes), used here as it is; a router that knows the hidden size is refused where that is another one.
* untrained, ramp; static, ramp: for people who train and search nothing (experiments/no_training.yaml).

R is `dynamic`, the paper's of 450 parameters and guide, or `projected` with guide "future". Measured as
experiments/schedules.py measures: KL of windows of test text as the searches have them, and questions that need
something far back in the prompt. What is finished is not done again. `--worker I/N` takes every N-th cell;
`--methods` does only those; `--tables` only writes tables and figure.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import budgets as study
import routers
import schedules as searches

KINDS = {"dynamic": {}, "projected": routers.FUTURE}
"""Name of a router -> what differs from the training's defaults."""
HOW = ("one", "one, longer", "own", "transferred")
METHODS = ["static", "static, ramp", "untrained, ramp", *(f"{kind}, {how}" for kind in KINDS for how in HOW)]
PAIRS = [(f"{kind}, {a}", f"{kind}, {b}") for kind in KINDS for a, b in (("one", "own"), ("one, longer", "own"))]
PAIRS += [(f"{kind}, transferred", f"{kind}, own") for kind in KINDS]
PAIRS += [(f"{kind}, {how}", "static") for kind in KINDS for how in HOW]
PAIRS += [("untrained, ramp", "static, ramp"), ("untrained, ramp", "static")]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--calibration", default="embedded", help="text to train and search on")
    parser.add_argument("--validation", default="embedded", help="text that the best state is chosen on")
    parser.add_argument("--test", action="append", metavar="NAME=SOURCE", help="test text, also of the questions")
    parser.add_argument("--family", type=Path, help="schedules.json to begin with")
    parser.add_argument("--anchors", default="0.3,0.6,0.8", help="budgets of the family; between them it is linear")
    parser.add_argument("--range", default="0.1,0.8", help="lowest and highest budget that `one` is trained for")
    parser.add_argument("--budgets", default="0.2,0.3,0.4,0.6,0.8")
    parser.add_argument("--kv", default="keep")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--longer", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=250_000, help="forward tokens of a search")
    parser.add_argument("--calibration_windows", type=int, default=32)
    parser.add_argument("--items", type=int, default=300, help="recall questions per seed")
    parser.add_argument("--windows", type=int, default=32, help="windows of test text per seed")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", default="; ".join(METHODS), help="separated by ;")
    parser.add_argument("--transfer", type=Path, help="output of this script for another model")
    parser.add_argument("--output", type=Path, default=Path("runs/one_router"))
    parser.add_argument("--worker", default="0/1")
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    args.methods = study.chosen(parser, args.methods, METHODS)
    if args.transfer is None:
        args.methods = [name for name in args.methods if not name.endswith("transferred")]
    args.range, args.anchors = numbers(args.range), numbers(args.anchors)
    if max(args.anchors) < max(args.range):
        parser.error(f"--range goes up to {max(args.range)}, --anchors to {max(args.anchors)}")
    return args


def numbers(text):
    return tuple(map(float, text.split(",")))


class Cell(routers.Cell):
    """One kv mode, budget and seed. Text, model and search are those of experiments/routers.py."""

    @functools.cached_property
    def validation(self):
        return self.windows(self.args.validation, "validation", 8, 200 + self.seed)

    @functools.cached_property
    def family(self):
        """The schedules of all budgets, the same for all seeds: the given ones, and what they lack, searched."""
        from ftp_lightning import ScheduleFamily

        path = self.args.output / f"family-{self.kv}.json"
        if not path.exists():
            known = ScheduleFamily.load(self.args.family).schedules if self.args.family else ()
            had = [schedule.budget for schedule in known]
            lacking = [b for b in self.args.anchors if all(abs(b - other) > 1e-6 for other in had)]
            found = [Cell(self.args, self.kv, budget, 0).searched_static() for budget in lacking]
            ScheduleFamily([*known, *found]).save(path)
        return ScheduleFamily.load(path)

    def searched_static(self):
        from ftp_lightning import StaticRouter, TokenPruner
        from ftp_lightning.search.allocations import late, ramp, step, uniform

        seeds = {made.__name__: made(self.blocks, self.budget) for made in (uniform, ramp, step, late)}
        pruner = TokenPruner(StaticRouter(), seeds["uniform"], kv=self.kv)
        return self.searched(pruner, seeds).schedule

    def find(self, name):
        """The pruner of one method at this budget, and the validations of its training."""
        from ftp_lightning import StaticRouter, TokenPruner, make_router
        from ftp_lightning.search.allocations import ramp

        kind, _, how = name.partition(", ")
        if how == "ramp":
            router = make_router(kind, self.blocks, self.model.config.hidden_size)
            return TokenPruner(router, ramp(self.blocks, self.budget), kv=self.kv), []
        schedule = self.family.at(self.budget)
        if not how:
            return TokenPruner(StaticRouter(), schedule, kv=self.kv), []
        place = router_place(self.args, self.kv, self.budget, self.seed, kind, how)
        if how != "transferred" and not (place / "pruned").exists():
            self.train(kind, how, place)
        router = TokenPruner.load(place / "pruned").router  # the router alone: it may serve another model
        return TokenPruner(router, schedule, kv=self.kv), json.loads((place / "training.json").read_text())

    def train(self, kind, how, place):
        """A router of its own under the schedule of this budget, or one for all budgets of the family."""
        import torch

        from ftp_lightning import TokenPruner, make_router
        from ftp_lightning.data.module import RowsData
        from ftp_lightning.lit.fitting import fit
        from ftp_lightning.lit.router_training import RouterTraining
        from ftp_lightning.lit.training_settings import TrainingSettings

        steps = self.args.steps * (self.args.longer if how.endswith("longer") else 1)
        settings = TrainingSettings(steps=steps, validations=3, seed=self.seed, **KINDS[kind])
        rows = self.windows(self.args.calibration, "training", steps * settings.batch_size, 100 + self.seed)
        torch.manual_seed(self.seed)
        router = make_router(kind, self.blocks, self.model.config.hidden_size)
        pruner = TokenPruner(router, self.family.at(self.budget), kv=self.kv)
        system = RouterTraining(self.model, pruner, settings, None if how == "own" else self.family, self.args.range)
        began = time.process_time()
        found = fit(system, RowsData(rows, self.validation, settings.batch_size, self.seed), place)
        seconds = time.process_time() - began
        pruner.save(place / "pruned")
        study.write(place / "training.json", {"validation": found["validation_kl"], "seconds": seconds})


def router_place(args, kv, budget, seed, kind, how):
    """Where a trained router lies; one that is transferred is an own one of the other study."""
    folder, how = (args.transfer, "own") if how == "transferred" else (args.output, how.replace(", ", "-"))
    return folder / "routers" / f"{kv}-{seed}-{kind}-{how}{f'-{budget}' if how == 'own' else ''}"


def missing(args, kv, budget, seed, known):
    """The methods that are still to be measured; those whose router the other study has not trained are left out."""
    names = [name for name in args.methods if name not in known]
    other = {name: router_place(args, kv, budget, seed, *name.split(", ")) for name in names if "transferred" in name}
    return [name for name in names if name not in other or (other[name] / "pruned").exists()]


def run(args):
    for cell in searches.cells_of(args):
        run_cell(args, *cell)


def run_cell(args, kv, budget, seed):
    target, known = study.cell_file(args, kv, budget, seed)
    names = missing(args, kv, budget, seed, known)
    if not names:
        return
    cell = Cell(args, kv, budget, seed)
    test, held = searches.tests_for(args, seed)
    for name in names:
        pruner, training = cell.find(name)
        row = test.measure(pruner) | {"held": held.measure("held", pruner), "training": training}
        row |= {"sparsity": list(pruner.schedule.sparsity), "parameters": pruner.router.parameter_count}
        known[name] = searches.compact(row)
        study.write(target, known)
        print(
            f"{kv} {budget:.0%} seed {seed} {name}: held out {row['held']['kl']:.4f}, kept {row['kept']['share']:.3f}",
            flush=True,
        )


def found_at(args, kv, budget, *names):
    """The cells of a budget, one per seed, in which all of these methods are finished."""
    cells = [json.loads(path.read_text()) for path in sorted(args.output.glob(f"{kv}-{budget}-*.json"))]
    return [cell for cell in cells if all(name in cell for name in names)]


def table(args, kv, title, show):
    """Markdown: a row per method that has anything, a column per budget; show: rows of one method -> text."""
    budgets = numbers(args.budgets)
    lines = []
    for name in METHODS:
        found = [[cell[name] for cell in found_at(args, kv, budget, name)] for budget in budgets]
        if any(found):
            cells = [f"{show(rows)} ({len(rows)})" if rows else "" for rows in found]
            parameters = next(rows for rows in found if rows)[0]["parameters"]
            lines.append(f"| {name} | {parameters:,} | {' | '.join(cells)} |")
    if lines:
        heads = "".join(f" {budget:.0%} |" for budget in budgets)
        print(f"\n### {title}, `{kv}` (seeds)\n\n| router | parameters |{heads}\n|---|---|{'---|' * len(budgets)}")
        print("\n".join(lines))


def comparisons(args, kv):
    """Markdown: A - B, paired over windows and questions of the seeds that have both."""
    for title, part in (("held-out KL", 0), ("kept, points", 1)):
        lines = []
        for a, b in PAIRS:
            both = [found_at(args, kv, budget, a, b) for budget in numbers(args.budgets)]
            if any(both):
                cells = [searches.paired(cells, a, b)[part] if cells else "" for cells in both]
                lines.append(f"| {a} - {b} | {' | '.join(cells)} |")
        if lines:
            heads = "".join(f" {budget:.0%} |" for budget in numbers(args.budgets))
            print(f"\n### Compared: {title}, `{kv}`\n\n| A - B |{heads}\n|---|{'---|' * len(numbers(args.budgets))}")
            print("\n".join(lines))


def figure(args, kv):
    """one_router-KV.png: held-out KL and kept answers against the budget, mean over the seeds; a colour per kind."""
    from ftp_lightning.report.style import CYCLE, LINES, canvas, freeze, house_style, plain_log, to_png

    shown = {("static", ""): CYCLE[0]}
    shown |= {(kind, how): color for kind, color in zip(KINDS, CYCLE[1:]) for how in ("own", "one", "one, longer")}
    lines = {(kind, how): curve(args, kv, f"{kind}, {how}".removesuffix(", ")) for kind, how in shown}
    losses = [point[1] for points in lines.values() for point in points]
    if not losses:
        return
    with house_style("one_router"):
        drawing, axes = canvas(8.4, 3.6, ncols=2)
        for (kind, how), points in lines.items():
            style = {"own": LINES[1], "one, longer": LINES[3]}.get(how, LINES[0])
            for axis, column in zip(axes, (1, 2)):
                if points:
                    about = {"color": shown[kind, how], "label": f"{kind} {how}".strip()}
                    axis.plot([p[0] for p in points], [p[column] for p in points], style, marker="o", **about)
        axes[0].set(xlabel="budget, %", ylabel="held-out KL (nats)", yscale="log")
        plain_log(axes[0].yaxis, math.log10(max(losses) / min(losses)))
        axes[1].set(xlabel="budget, %", ylabel="kept answers, %", ylim=(0, None))
        drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, handlelength=3.5)
        freeze(drawing)
        (args.output / f"one_router-{kv}.png").write_bytes(to_png(drawing))


def curve(args, kv, name):
    """(budget in %, held-out KL, kept in %) of each budget, mean over the seeds."""
    points = []
    for budget in numbers(args.budgets):
        rows = [cell[name] for cell in found_at(args, kv, budget, name)]
        if rows:
            kl, kept = ([row[part][key] for row in rows] for part, key in (("held", "kl"), ("kept", "share")))
            points.append((100 * budget, statistics.mean(kl), 100 * statistics.mean(kept)))
    return points


def main():
    args = arguments()
    if not args.tables:
        run(args)
    for kv in args.kv.split(","):
        table(args, kv, "Held-out KL", lambda rows: study.mean_std([row["held"]["kl"] for row in rows], 4))
        table(args, kv, "Kept, %", lambda rows: study.mean_std([100 * row["kept"]["share"] for row in rows], 1))
        comparisons(args, kv)
        figure(args, kv)


if __name__ == "__main__":
    main()
