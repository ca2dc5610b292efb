"""Which way of spreading a budget over the blocks keeps most, and what does each cost?  python experiments/schedules.py
--help

For every (kv, budget, seed), with the static router: the closed-form allocations, greedy, best-of-N random, a plain
genetic algorithm as in the paper (population 32, all calibration windows for every candidate, 30 generations, no memo),
EvoPress' published settings for non-uniform sparsity (64 children; 8, 2 and 1 survive on 1/32, 1/4 and all of the
calibration tokens, a window at least; no memo), both with our operators, and ours. All searches stop at the forward
tokens that the plain one takes, ours at half of them; what starts from a measured sensitivity is charged for it. Ours
has four times the calibration windows, as it measures most candidates on a quarter of them; "ours same windows" has
those of the others; "ours tv" minimises the total variation in place of KL (`--criterion tv`). Calibration KL is that
on the common windows. Then every schedule is measured on test text and on questions that need something far back in the
prompt, as experiments/budgets.py measures them, and on windows of test text as the searches have them, of their length
and of twice that.

What is finished is not done again. `--worker I/N` takes every N-th cell (start N processes); `--methods` does only
those; `--tables` only writes tables and figure. These show the cells in which ours is finished.

The rivals have no memo and no shared prefixes, and are charged for every token. What they would compute twice is
computed once here, which changes no digit; and a schedule of the plain GA and of best-of-N random that is already
behind on some windows, and so cannot be chosen, is not measured on the others.
"""

import argparse
import functools
import itertools
import json
import math
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import budgets as study

SEARCHES = ("best of random", "plain GA", "EvoPress settings", "ours same windows", "ours", "ours tv")
ON_COMMON = SEARCHES[:4]
"""Those that minimise the KL of the common calibration windows; ours have `MORE` times as many."""
MORE = 4
HELD = {"held": 192, "long": 448}
"""Windows of test text: the prompt tokens of each kind; 64 tokens of continuation follow."""
STARTS_FROM = {"block influence": ("dense",), "gradient": ("dense", "gradient"), "sensitivity": ("dense", "kl")}
STARTS_FROM |= dict.fromkeys(SEARCHES[3:], ("dense", "gradient", "kl"))
"""What of the sensitivity a method looks at; its forward tokens are charged to it."""


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--calibration", default="embedded", help="text to search on; used whole unless embedded")
    parser.add_argument("--test", action="append", metavar="NAME=SOURCE", help="test text, also of the questions")
    parser.add_argument("--budgets", default="0.3,0.6")
    parser.add_argument("--kv", default="keep,evict")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--calibration_windows", type=int, default=32)
    parser.add_argument("--population", type=int, default=32, help="of the plain GA")
    parser.add_argument("--generations", type=int, default=30, help="of the plain GA")
    parser.add_argument("--items", type=int, default=700, help="recall questions per seed")
    parser.add_argument("--windows", type=int, default=64, help="windows of test text per seed")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", help="comma-separated, as in the tables; default: all")
    parser.add_argument("--output", type=Path, default=Path("runs/schedules"))
    parser.add_argument("--worker", default="0/1")
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    known = every_method()
    args.methods = study.chosen(parser, args.methods, known, separator=",") if args.methods else known
    return args


def every_method():
    """As the tables name and order them: the allocations, then the searches."""
    from ftp_lightning.search.allocate import ALLOCATIONS

    return [*(name.replace("_", " ") for name in ALLOCATIONS), *SEARCHES]


class Cell:
    """One kv mode, budget and seed: the fitness and the searches on it."""

    def __init__(self, args, kv, budget, seed):
        from ftp_lightning.models import load

        self.args, self.kv, self.budget, self.seed = args, kv, budget, seed
        self.model, tokenizer = load(args.model, dtype=args.dtype)
        self.blocks = self.model.config.num_hidden_layers
        count = MORE * args.calibration_windows
        self.more_windows = study.search_windows(tokenizer, args.calibration, "calibration", count, seed)
        self.windows = self.more_windows.subset(range(args.calibration_windows))
        self.tokens = args.population * (args.generations + 1) * self.windows.input_ids.numel()

    def make_pruner(self, schedule):
        from ftp_lightning import StaticRouter, TokenPruner

        return TokenPruner(StaticRouter(), schedule, kv=self.kv)

    def fitness(self, chunk, ours=True, windows=None, criterion="kl"):
        from ftp_lightning.search.criteria import CRITERIA
        from ftp_lightning.search.fitness import ContinuationFitness

        about = {"chunk": chunk, "criterion": CRITERIA[criterion](), "memo": ours, "share_prefix": ours}
        found = ContinuationFitness(self.model, windows or self.windows, self.make_pruner, **about)
        if not ours:  # charged each time, computed once
            found.measure = functools.cache(found.measure)
        return found

    def settings(self, **changes):
        from ftp_lightning.search.settings import SearchSettings

        more = {"generations": 10**6, "max_forward_tokens": self.tokens, "seed": self.seed}
        return SearchSettings(budget=self.budget, **more | changes)

    def random_schedules(self, count):
        from ftp_lightning.search.allocations import random_allocation

        rng = random.Random(f"{self.seed}/schedules")
        return [random_allocation(self.blocks, self.budget, rng) for _ in range(count)]

    def bounded(self):
        from ftp_lightning.search.fitness import MemoFitness

        class Bounded(MemoFitness):
            """The loss on all windows, or what it is at least once that is above `bound`: a loss is never negative,
            so what is behind on some windows stays behind. Charged in full."""

            bound = float("inf")

            def measure(self, schedule, chunk):
                total = 0.0
                for part, size in enumerate(parts.sizes):
                    total += parts.measure(schedule, part) * size / sum(parts.sizes)
                    if total > self.bound:
                        break
                return total

            def cost(self, schedule, chunk):
                return parts.windows.input_ids.numel()

        parts = self.fitness(2, ours=False)
        found = Bounded([len(self.windows)], memo=False)
        found.forward_tokens = parts.forward_tokens
        return found

    def best_of_random(self):
        """As many random schedules as the plain GA measures candidates, on all windows each."""
        fitness, best, curve = self.bounded(), None, []
        for schedule in self.random_schedules(self.args.population * (self.args.generations + 1)):
            loss = fitness(schedule)
            if loss < fitness.bound:
                fitness.bound, best = loss, schedule
            curve.append((fitness.forward_tokens, fitness.bound))
        return best, curve

    def searched(self, name):
        from ftp_lightning import Schedule
        from ftp_lightning.search.allocate import seed_allocations
        from ftp_lightning.search.genetic import genetic_search

        size, count, hear = self.args.population, self.args.calibration_windows, None
        if name == "plain GA":
            fitness = self.bounded()

            def hear(state):  # a child worse than all parents is no parent
                fitness.bound = max(parent["value"] for parent in state["parents"])

            alone = {"stage_windows": (count,), "survivors": (size,)}
            more = {"offspring": size, "parents": size, "tournament": 3, "crossover": 0.6, "proposed": 0.0}
            settings = self.settings(**more, switches=1, **alone)
            seeds = {f"random {i}": one for i, one in enumerate(self.random_schedules(size))}
        elif name == "EvoPress settings":
            few, more = max(1, count // 32), max(2, count // 4)
            fitness = self.fitness(few, ours=False)
            stages = {"stage_windows": (few, more), "survivors": (8, 2)}
            settings = self.settings(offspring=64, parents=1, crossover=0.0, switches=3, proposed=0.0, **stages)
            seeds = {"uniform": Schedule.uniform(self.blocks, self.budget)}
        else:
            windows = self.windows if name in ON_COMMON else self.more_windows
            criterion = "tv" if name == "ours tv" else "kl"
            fitness = self.fitness(max(1, len(windows) // 4), windows=windows, criterion=criterion)
            settings = self.settings(max_forward_tokens=max(1, self.tokens // 2 - self.charged(name)))
            seeds = seed_allocations(self.request())
        found = genetic_search(fitness, self.blocks, settings, seeds, hear)
        return found.schedule, [(entry["forward_tokens"], entry["best"]) for entry in found.generations]

    def request(self, measure=None):
        from ftp_lightning.search.allocate import AllocationRequest

        about = {"num_blocks": self.blocks, "budget": self.budget, "seed": self.seed, "kv": self.kv}
        return AllocationRequest(**about, sensitivity=self.sensitivity, measure=measure)

    @functools.cached_property
    def sensitivity(self):
        """What stage `sensitivity` measures on as many windows as the searches have."""
        from ftp_lightning.stages.sensitivity import SensitivityStage

        folder = self.args.output / f"sensitivity-{self.kv}-{self.seed}"
        whole = study.whole(self.args.calibration)
        shared = {"model": self.args.model, "dtype": self.args.dtype, "device": "cpu", "tracking": "none", **whole}
        about = {"kv": self.kv, "windows": self.args.calibration_windows, "seed": self.seed}
        SensitivityStage(**shared, **about, output=str(folder)).execute()
        return json.loads((folder / "sensitivity.json").read_text())

    def find(self, name):
        """Schedule and [(forward tokens, best loss so far)] of one method."""
        schedule, curve = self.best_of_random() if name == "best of random" else self.made(name)
        before = self.charged(name)
        return schedule, [(before + tokens, loss) for tokens, loss in curve]

    def charged(self, name):
        """Forward tokens of the measured sensitivity that a method starts from."""
        return sum(self.sensitivity["forward_tokens"][part] for part in STARTS_FROM.get(name, ()))

    def made(self, name):
        if name in SEARCHES:
            return self.searched(name)
        from ftp_lightning.search.allocate import ALLOCATIONS

        fitness = self.fitness(8)
        schedule = ALLOCATIONS[name.replace(" ", "_")](self.request(fitness))
        return schedule, [(fitness.forward_tokens, fitness(schedule))]


class Held:
    """Windows of test text as the searches have them, half with facts to recall (of `kinds`, else of all), of their
    length and twice that; measured dense once per process. test: a `budgets.Test` of the same seed and source."""

    known: dict = {}

    def __init__(self, args, seed, source, test, kinds=None):
        self.model, about = test.model, (seed, source, kinds)
        if about not in self.known:
            self.known[about] = self._prepare(args, seed, source, test, kinds)
        self.sets = self.known[about]

    def _prepare(self, args, seed, source, test, kinds):
        from ftp_lightning.evaluation.continuation import teacher_logprobs

        asked = test.tokenizer, source, "test", args.windows, seed
        sets = [study.search_windows(*asked, prompt, kinds) for prompt in HELD.values()]
        return {name: (windows, teacher_logprobs(test.model, windows, 8)) for name, windows in zip(HELD, sets)}

    def measure(self, name, pruner):
        from ftp_lightning.evaluation.continuation import evaluate_rows

        windows, teacher = self.sets[name]
        text = evaluate_rows(self.model, windows, pruner, batch_size=8, teacher=teacher)
        return {"kl": text.kl_mean, "kl_rows": text.kl_rows}


def run(args):
    for cell in cells_of(args):
        run_cell(args, *cell)


def tests_for(args, seed, kinds=None):
    """`Test` and `Held` of the first test text; kinds: of which all its facts are."""
    source = next(iter(study.tests_of(args).values()))
    test = study.Test(args, seed, source, recall=True, kinds=kinds)
    return test, Held(args, seed, source, test, kinds)


def cells_of(args):
    """(kv, budget, seed) of each cell that this process does, seed by seed."""
    cells = itertools.product(map(int, args.seeds.split(",")), map(float, args.budgets.split(",")), args.kv.split(","))
    return [(kv, budget, seed) for seed, budget, kv in study.own_cells(args, cells)]


def run_cell(args, kv, budget, seed):
    """Find and measure what is missing of a cell."""
    from ftp_lightning import Schedule

    target, known = study.cell_file(args, kv, budget, seed)
    if all(is_done(known.get(name, {})) for name in args.methods):
        return
    cell = Cell(args, kv, budget, seed)
    test, held = tests_for(args, seed)
    for name in args.methods:
        row = known.setdefault(name, {})
        if not row:
            schedule, curve = cell.find(name)
            own = name in ("ours", "ours tv")  # other windows, or another loss
            calibration = cell.fitness(8)(schedule) if own else curve[-1][1]
            row |= {"sparsity": list(schedule.sparsity), "curve": curve, "calibration": calibration}
        pruner = cell.make_pruner(Schedule(row["sparsity"]))
        if "kept" not in row:
            row |= test.measure(pruner)
        row |= {part: held.measure(part, pruner) for part in HELD if part not in row}
        known[name] = compact(row)
        study.write(target, known)
        print(
            f"{kv} {budget:.0%} seed {seed} {name}: calibration KL {row['calibration']:.5f}, "
            f"held out {row['held']['kl']:.5f}, kept {row['kept']['share']:.3f}, {row['curve'][-1][0]:,} tokens",
            flush=True,
        )


def compact(value):
    """What is kept of a row: of a curve the steps, of numbers seven digits, of answers 0 or 1."""
    if isinstance(value, dict):
        found = {name: compact(one) for name, one in value.items() if name not in ("curve", "sparsity")}
        if "curve" in value:
            curve, steps = value["curve"], [value["curve"][0]]
            for point in curve[1:]:
                if point[1] < steps[-1][1]:
                    steps.append(point)
            found["curve"] = steps if steps[-1][0] == curve[-1][0] else [*steps, curve[-1]]
        return found | ({"sparsity": value["sparsity"]} if "sparsity" in value else {})
    if isinstance(value, list):
        return [compact(one) for one in value]
    return int(value) if isinstance(value, bool) else float(f"{value:.7g}") if isinstance(value, float) else value


def finished(args, kv, budget):
    """What was found for each seed that has ours."""
    cells = [json.loads(path.read_text()) for path in sorted(args.output.glob(f"{kv}-{budget}-*.json"))]
    return [cell for cell in cells if is_done(cell.get("ours", {}))]


def is_done(row):
    return row.keys() >= {"kept", *HELD}


def table(args, kv, budget):
    """Markdown: each method, mean and std over the seeds that have it; ours against it, paired over passages."""
    cells = finished(args, kv, budget)
    if not cells:
        return
    print(f"\n### {budget:.0%}, `{kv}`\n")
    print(
        "| schedule | seeds | calibration KL | held-out KL | KL at twice the length | KL of prose | kept, % "
        "| ours - it: held-out KL | ours - it: kept, points | forward tokens |"
    )
    print("|---" * 10 + "|")
    for name in every_method():
        having = [cell for cell in cells if is_done(cell.get(name, {}))]
        if having:
            print(f"| {name} | {len(having)} | {' | '.join(table_row(having, name))} |")
    for rival in ("plain GA", "EvoPress settings"):
        both = [cell for cell in cells if is_done(cell.get(rival, {})) and is_done(cell.get("ours same windows", {}))]
        shares = [share_of_tokens(cell["ours same windows"]["curve"], cell[rival]["curve"]) for cell in both]
        print(f"\nForward tokens to the final loss of {rival}, ours same windows as a share of its own: {shares}")


def table_row(cells, name):
    """The columns of one method, over the cells that have it."""
    rows = [cell[name] for cell in cells]
    losses = [[row["calibration"], row["held"]["kl"], row["long"]["kl"], row["kl"]] for row in rows]
    shown = [study.mean_std(column, 4) for column in zip(*losses)]
    shown.append(study.mean_std([100 * row["kept"]["share"] for row in rows], 1))
    shown += ["", ""] if name == "ours" else paired(cells, "ours", name)
    return [*shown, f"{statistics.median(row['curve'][-1][0] for row in rows):,.0f}"]


def paired(cells, name, other):
    """`name` minus `other` with its interval over seeds: held-out KL over windows, kept answers in points."""
    pairs = [(cell[name], cell[other]) for cell in cells]
    kl = [
        (a, b, (seed, item), seed)
        for seed, (one, two) in enumerate(pairs)
        for item, (a, b) in enumerate(zip(one["held"]["kl_rows"], two["held"]["kl_rows"]))
    ]
    return [study.interval(kl, 4), study.interval(study.answers(pairs), 1, 100.0)]


def share_of_tokens(ours, rival):
    """Ours' tokens at the rival's final loss / the rival's when it got there; None where ours never did."""
    final = rival[-1][1]
    there = next(tokens for tokens, loss in rival if loss <= final)
    own = next((tokens for tokens, loss in ours if loss <= final), None)
    return None if own is None else round(own / there, 3)


def figure(args):
    """schedules.png: best calibration loss against forward tokens, and the schedules found, mean over the seeds."""
    from ftp_lightning.report.style import canvas, freeze, house_style, to_png

    grid = list(itertools.product(map(float, args.budgets.split(",")), args.kv.split(",")))
    found = {(budget, kv): finished(args, kv, budget) for budget, kv in grid}
    shown = [cell for cell in grid if found[cell]]
    if not shown:
        return
    with house_style("schedules"):
        drawing, axes = canvas(max(4.8, 3.2 * len(shown)), 5.4, nrows=2, ncols=len(shown), squeeze=False)
        for (budget, kv), (top, bottom) in zip(shown, axes.T):
            draw_curves(top, found[budget, kv])
            top.set_title(f"{budget:.0%}, {kv}")
            draw_schedules(bottom, found[budget, kv])
        axes[0][0].set_ylabel("best calibration KL (nats)")
        axes[1][0].set_ylabel("sparsity, mean over seeds")
        drawing.legend(*axes[1][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(SEARCHES))
        freeze(drawing)
        (args.output / "schedules.png").write_bytes(to_png(drawing))


def draw_curves(axis, cells):
    """A line per search and seed, a dot where it ends."""
    from ftp_lightning.report.figures import kl_scale_to_range, si_formatter
    from ftp_lightning.report.style import CYCLE, plain_log

    points = [point for cell in cells for name in ON_COMMON if name in cell for point in cell[name]["curve"]]
    tokens, losses = zip(*points)
    for color, name in zip(CYCLE, ON_COMMON):
        for cell in (cell for cell in cells if name in cell):
            axis.step(*zip(*cell[name]["curve"]), where="post", color=color, alpha=0.8, marker="o", markevery=[-1])
    axis.set(xscale="log", xlabel="forward tokens")
    plain_log(axis.xaxis, math.log10(max(tokens) / min(tokens)))
    axis.xaxis.set_major_formatter(si_formatter())
    kl_scale_to_range(axis, losses)


def draw_schedules(axis, cells):
    """A group of bars per block."""
    from ftp_lightning.report.style import CYCLE

    for shift, (color, name) in enumerate(zip(CYCLE, SEARCHES)):
        found = [cell[name]["sparsity"] for cell in cells if name in cell]
        means = [statistics.mean(column) for column in zip(*found)]
        places = [block + 0.14 * (shift - 2.5) for block in range(1, len(means) + 1)]
        axis.bar(places[: len(means)], means, 0.14, color=color, label=name)
    axis.set(xlabel="block", ylim=(0, 1), xticks=range(1, len(means) + 1, max(1, len(means) // 8)))


def main():
    args = arguments()
    if not args.tables:
        run(args)
    for budget, kv in itertools.product(map(float, args.budgets.split(",")), args.kv.split(",")):
        table(args, kv, budget)
    figure(args)


if __name__ == "__main__":
    main()
