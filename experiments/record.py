"""How much of a prompt's FLOPs can go while 99 % of the answers that need the prompt are kept?
python experiments/record.py --help

Candidates are the pruned folders of `--trained` (from experiments/routers.py) of every `--methods`: at a cut of the
prefill's FLOPs each seed takes its folder of the nearest budget, its schedule scaled by one factor until the cut is met
(s_l -> min(1, c s_l)). Chosen on validation text, all seeds together: the largest cut at which `--keep` of the answers
are kept. It, and the next larger cut, are measured on test text; beside them at the same cut whatever else one could
do: the static router under the schedule found for it (also scaled), what needs no training and no search (static
router, a ramp), the paper's configuration, prompt deletion. "+ rank 8": a skipped token gets a low-rank map of its
state, fitted in closed form to the finished pruner. The interval is Wilson's over the answers of all seeds. The time
to first token is measured with random prompts of every `--lengths`, dense and pruned in turn: run it alone.

What is finished is not done again; `--tables` measures nothing.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import budgets as study
import routers
import schedules

RANK, COMPENSATED = 8, " + rank 8"
RIVALS = {
    "static, searched": "static router, searched schedule",
    "no training": "nothing trained or searched: static router, ramp",
    "paper": "the paper's configuration: four factors, `evict`",
    "deletion, recent": "prompt deletion: the latest tokens stay",
    "deletion, surprising": "prompt deletion: the surprising ones stay (the look is not charged)",
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--trained", type=Path, default=Path("runs/routers"))
    parser.add_argument("--static", type=Path, default=Path("experiments/found/schedules"))
    parser.add_argument("--calibration", default="embedded", help="text that a compensation is fitted on")
    parser.add_argument("--validation", default="embedded", help="text that the cut is chosen on")
    parser.add_argument("--test", action="append", metavar="NAME=SOURCE")
    parser.add_argument("--methods", default=f"projected; projected{COMPENSATED}", help="separated by ;")
    parser.add_argument("--keep", type=float, default=0.99)
    parser.add_argument("--cuts", default="0.15,0.175,0.2,0.225,0.25,0.275,0.3", help="shares of the prefill's FLOPs")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--items", type=int, default=400, help="questions per seed")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--lengths", default="192,448", help="of the prompts that are timed")
    parser.add_argument("--pairs", type=int, default=25, help="timed pairs; 0: none")
    parser.add_argument("--long", default="random:llama-110m", help="model of random weights to time longer prompts on")
    parser.add_argument("--long_lengths", default="1024,2048")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("runs/record"))
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    known = [name + end for name in routers.METHODS for end in ("", COMPENSATED)]
    args.methods = study.chosen(parser, args.methods, known)
    args.cuts, args.seeds = sorted(map(float, args.cuts.split(","))), [int(seed) for seed in args.seeds.split(",")]
    return args


def scaled(model, pruner, cut):
    """The pruner with its schedule scaled to the cut of a prompt of 192 tokens."""
    from ftp_lightning.pruning.budget import solve_budget

    kv, rank = pruner.kv, pruner.skip_rank
    return pruner.with_schedule(solve_budget(model, cut, 192, kv, pruner.schedule, rank=rank))


def nearest(paths, cut):
    """Of (budget, path) the path whose budget is nearest; a budget of B cuts a little less than B."""
    if not (found := list(paths)):
        raise SystemExit("no folder to take a router from\nRun experiments/routers.py first, or give --trained.")
    return min(found, key=lambda one: abs(one[0] * 0.9 - cut))[1]


class Candidates:
    """The pruners of one cut and seed."""

    fitted: dict = {}

    def __init__(self, args, test):
        self.args, self.model, self.tokenizer = args, test.model, test.tokenizer

    def __call__(self, name, cut, seed):
        return self._deleted(name, cut) if name in DELETED else scaled(self.model, self._form(name, cut, seed), cut)

    def _form(self, name, cut, seed):
        from ftp_lightning import Schedule, StaticRouter, TokenPruner
        from ftp_lightning.search.allocations import ramp

        blocks = self.model.config.num_hidden_layers
        if name == "no training":
            return TokenPruner(StaticRouter(), ramp(blocks, cut), kv="keep")
        if name == "static, searched":
            found = self.args.static.glob(f"keep-*-{seed}.json")
            path = nearest(((float(path.stem.split("-")[1]), path) for path in found), cut)
            return TokenPruner(StaticRouter(), Schedule(json.loads(path.read_text())["ours"]["sparsity"]), kv="keep")
        if name.endswith(COMPENSATED):
            return self._compensated(self._form(name.removesuffix(COMPENSATED), cut, seed), seed)
        kv, place = ("evict" if name == "paper" else "keep"), study.place_of(name)
        found = self.args.trained.glob(f"{kv}-*-{seed}-{place}/pruned")
        return TokenPruner.load(nearest(((float(path.parent.name.split("-")[1]), path) for path in found), cut))

    def _compensated(self, pruner, seed):
        """With a low-rank map for skipped tokens, fitted here: router and schedule know nothing of it."""
        from ftp_lightning import fit_compensation

        if seed not in self.fitted:
            windows = study.search_windows(self.tokenizer, self.args.calibration, "calibration", 64, 300 + seed)
            self.fitted[seed] = fit_compensation(self.model, windows, RANK)
        return pruner.changed(skip="low-rank", compensation=self.fitted[seed])

    def _deleted(self, name, cut):
        from ftp_lightning.baselines.registry import PEERS, Profile, Setting

        return PEERS[DELETED[name]].place(Setting(self.model), cut, Profile(192, 0))


DELETED = {"deletion, recent": "deletion_recent", "deletion, surprising": "deletion_surprisal"}


def measured(args, part, name, cut, seed, test):
    """One row, from its file where it is finished."""
    path = args.output / f"{part}-{study.place_of(name)}-{cut}-{seed}.json"
    sizes = [args.items, args.windows, args.dtype]
    if path.exists() and (row := json.loads(path.read_text()))["sizes"] == sizes:
        return row
    pruner = Candidates(args, test)(name, cut, seed)
    row = {"sizes": sizes, "name": name, "cut": cut, "seed": seed, "part": part, **test.measure(pruner)}
    row |= {"parameters": pruner.router.parameter_count, "sparsity": list(pruner.schedule.sparsity)}
    path.parent.mkdir(parents=True, exist_ok=True)
    study.write(path, schedules.compact(row))
    print(f"{part} {name} {cut:.1%} seed {seed}: kept {row['kept']['share']:.4f}, KL {row['kl']:.4f}", flush=True)
    return row


def together(rows):
    """`Kept` of all seeds' answers, with an interval over seeds; each seed asks questions of its own."""
    from ftp_lightning.evaluation.statistics import kept

    items = [
        (right, (seed, place), seed)
        for seed, row in enumerate(rows)
        for place, (right, need) in enumerate(zip(row["right"], row["need"]))
        if need
    ]
    right, places, seeds = map(list, zip(*items))
    return kept([True] * len(right), [False] * len(right), right, places, seeds)


def choose(args, name):
    """The largest cut whose kept answers on validation text reach `--keep`, and the next; from the smallest cut on
    until two in a row miss it."""
    from argparse import Namespace

    about = Namespace(**vars(args) | {"test": [f"books={args.validation}"]})
    best, missed = None, 0
    for cut in args.cuts:
        rows = [
            measured(args, "validation", name, cut, seed, study.Test(about, seed, args.validation, recall=True))
            for seed in args.seeds
        ]
        share = together(rows).share
        print(f"validation {name}: a cut of {cut:.1%} keeps {share:.2%}", flush=True)
        best, missed = (cut, 0) if share >= args.keep else (best, missed + 1)
        if missed == 2:
            break
    return best


def run(args):
    chosen = {name: choose(args, name) for name in args.methods}
    reached = {name: cut for name, cut in chosen.items() if cut is not None}
    args.output.mkdir(parents=True, exist_ok=True)
    study.write(args.output / "chosen.json", chosen)
    if not reached:
        return print(f"no cut of {args.cuts} keeps {args.keep:.0%} on validation text")
    source, top = next(iter(study.tests_of(args).values())), max(reached.values())
    wider = [cut for cut in args.cuts if cut > top][:1]
    for cut, seed in itertools.product([top, *wider], args.seeds):
        test = study.Test(args, seed, source, recall=True)
        for name in [*args.methods, *RIVALS]:
            measured(args, "test", name, cut, seed, test)
    if args.pairs:
        time(args, max(reached, key=reached.get), top, study.Test(args, args.seeds[0], source, recall=True))


def time(args, name, cut, test):
    """Prefills of the model, and of one with random weights where prompts are longer, each under the same schedule."""
    from ftp_lightning import make_router
    from ftp_lightning.models import load

    pruner, lengths = Candidates(args, test)(name, cut, args.seeds[0]), map(int, args.lengths.split(","))
    found = [timed(args, test.model, pruner, length) for length in lengths]
    large = load(args.long, dtype="float32")[0]
    if (blocks := large.config.num_hidden_layers) == len(pruner.kv):
        pruner = pruner.changed(router=make_router("projected", blocks, large.config.hidden_size), skip="identity")
        found += [timed(args, large, pruner, int(length)) for length in args.long_lengths.split(",")]
    study.write(args.output / "time.json", {"name": name, "cut": cut, "prefill": found})


def timed(args, model, pruner, length):
    """Dense and pruned prefills in turn, of random prompts: the router looks at them, which costs the same."""
    import torch

    from ftp_lightning.evaluation.speed.prefill import prefill_speed
    from ftp_lightning.evaluation.speed.prompts import random_prompts
    from ftp_lightning.pruning.flops import flops_reduction

    generator = torch.Generator().manual_seed(0)
    prompts = random_prompts(model, length, 1, generator=generator)
    speed = prefill_speed(model, pruner, prompts, args.pairs, generator=generator)
    limit = 1 / (1 - flops_reduction(model, pruner.scheduled, length, pruner.kv))
    ratio = {"ratio": speed.ratio.value, "low": speed.ratio.low, "high": speed.ratio.high}
    return {"tokens": length, "hidden": model.config.hidden_size, "limit": limit, **ratio}


def tables(args):
    rows = [json.loads(path.read_text()) for path in sorted(args.output.glob("test-*.json"))]
    print(f"\nchosen on validation text: {json.loads((args.output / 'chosen.json').read_text())}")
    for cut in sorted({row["cut"] for row in rows}):
        print(f"\n### {cut:.1%} of the prefill's FLOPs\n")
        print(
            "| | parameters | kept, % of all answers | by seed | KL of prose | FLOPs cut, realised |\n"
            + "|---" * 6
            + "|"
        )
        for name in [*args.methods, *RIVALS]:
            if here := [row for row in rows if row["cut"] == cut and row["name"] == name]:
                print(f"| {RIVALS.get(name, name)} | {' | '.join(table_row(here))} |")
    if (args.output / "time.json").exists():
        timed = json.loads((args.output / "time.json").read_text())
        print(f"\n{timed['name']} at {timed['cut']:.1%}: prefill, dense / pruned, medians of pairs in turn")
        for row in timed["prefill"]:
            interval = f"{row['ratio']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]"
            print(f"* {row['tokens']} tokens: {interval}, FLOPs limit {row['limit']:.2f}x, D = {row['hidden']}")


def table_row(rows):
    all_of = together(rows)
    return (
        f"{rows[0]['parameters']:,}",
        f"{100 * all_of.share:.1f} [{100 * all_of.low:.1f}, {100 * all_of.high:.1f}] of {all_of.items}",
        study.mean_std([100 * row["kept"]["share"] for row in rows], 1),
        study.mean_std([row["kl"] for row in rows], 4),
        study.mean_std([100 * row["flops_cut"] for row in rows], 1),
    )


def main():
    args = arguments()
    if not args.tables:
        run(args)
    tables(args)


if __name__ == "__main__":
    main()
