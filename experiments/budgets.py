"""What does each method keep at 22, 30, 40 and 60 %, in both kv modes, over three seeds?  python experiments/budgets.py --help

For every (kv, seed, budget): sensitivity, search with the static router, router training, fine-tuning, evaluation on each test text: the
stages of `ftp-lightning run`, called in one process. Finished stages are not run again, so the study goes on where it was stopped.
`--worker I/N` takes every N-th cell (start N processes); `--tables` only writes the tables of what is finished.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

METHODS = ("random", "uniform", "block_influence", "static", "dynamic (before fine-tuning)", "dynamic")
SHOWN = ("random", "uniform", "Block Influence", "static, searched", "dynamic, before fine-tuning", "dynamic, fine-tuned")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--calibration", default="embedded", help="text for sensitivity and search; used whole unless embedded")
    parser.add_argument("--train", default="embedded", help="text to train the router on")
    parser.add_argument("--test", action="append", metavar="NAME=SOURCE", help="test text; the first one also gets the recall questions")
    parser.add_argument("--budgets", default="0.22,0.3,0.4,0.6")
    parser.add_argument("--kv", default="keep,evict")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--items", type=int, default=700, help="recall questions per seed, different ones each")
    parser.add_argument("--windows", type=int, default=64, help="windows per test text and seed")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--finetune_generations", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("runs/budgets"))
    parser.add_argument("--worker", default="0/1")
    parser.add_argument("--tables", action="store_true")
    return parser.parse_args()


def whole(source):
    """Every text of ours is for one purpose, so all of it is used; the embedded stories have splits of their own."""
    return {"data": source, "split": "auto" if source == "embedded" else "all"}


def tests_of(args):
    return dict(pair.split("=", 1) for pair in args.test or ["stories=embedded"])


def cell(args, kv, seed, budget):
    """All stages of one cell, in order."""
    from ftp_lightning.stages.evaluate import BASELINES, EvaluateStage
    from ftp_lightning.stages.search import SearchStage
    from ftp_lightning.stages.sensitivity import SensitivityStage
    from ftp_lightning.stages.train import TrainStage

    shared = {"model": args.model, "dtype": args.dtype, "seed": seed, "device": "cpu", "tracking": "none"}
    common, own = args.output / f"{kv}-seed{seed}", args.output / f"{kv}-seed{seed}-{budget}"
    measured = str(common / "sensitivity.json")
    search = {"budget": budget, "kv": kv, "sensitivity": measured, "offspring": 10, "windows": 24, **whole(args.calibration)}
    SensitivityStage(**shared, kv=kv, windows=8, output=str(common), **whole(args.calibration)).execute()
    SearchStage(**shared, **search, generations=args.generations, output=str(own / "search")).execute()
    schedule, trained, tuned = (str(own / p) for p in ("search/schedule.json", "train/pruned", "finetune/pruned"))
    train = whole(args.train) | ({"split": "auto"} if args.train != "embedded" else {})  # validation comes from the same text
    TrainStage(**shared, kv=kv, schedule=schedule, steps=args.steps, validations=3, output=str(own / "train"), **train).execute()
    tuning = {"generations": args.finetune_generations, "pruned": trained, "schedule": schedule, "output": str(own / "finetune")}
    SearchStage(**shared, **search, **tuning).execute()
    compared = {"pruned": tuned, "before": trained, "static_schedule": schedule, "sensitivity": measured, "compare": BASELINES}
    for number, (name, source) in enumerate(tests_of(args).items()):
        tasks = ("story_recall",) if number == 0 else ()
        sizes = {"items": args.items, "windows": args.windows, "batch_size": 16, "tasks": tasks, "output": str(own / f"evaluate-{name}")}
        EvaluateStage(**shared, **compared, **sizes, **whole(source)).execute()


def run(args):
    import torch

    torch.set_num_threads(1)
    index, workers = map(int, args.worker.split("/"))
    cells = list(itertools.product(args.kv.split(","), map(int, args.seeds.split(",")), map(float, args.budgets.split(","))))
    mine = [c for i, c in enumerate(itertools.groupby(cells, key=lambda c: c[:2])) for c in list(c[1]) if i % workers == index]
    for kv, seed, budget in sorted(mine, key=lambda c: c[1]):
        print(f"== {kv}, seed {seed}, budget {budget}", flush=True)
        cell(args, kv, seed, budget)


def mean_std(values, digits):
    values = [v for v in values if v is not None]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(args, kv, budget):
    """Markdown rows of one kv mode and budget, mean ± std over the seeds that are finished."""
    tests = list(tests_of(args))
    found = {name: [] for name in tests}
    for name in tests:
        for path in sorted(args.output.glob(f"{kv}-seed*-{budget}/evaluate-{name}/results.json")):
            found[name].append(json.loads(path.read_text()))
    if not found[tests[0]]:
        return
    seeds = len(found[tests[0]])
    print(f"\n### {budget:.0%}, `{kv}`, {seeds} seed{'s' * (seeds > 1)}\n")
    heads = "".join(f" KL {n} | PPL {n} |" for n in tests)
    print(f"| method | kept, % | answers |{heads} realised | FLOPs cut |\n|---|---|---|{'---|---|' * len(tests)}---|---|")
    ppl = "".join(f" 0 | {mean_std([r['dense']['ppl'] for r in found[n]], 1)} |" for n in tests)
    print(f"| dense | 100 | |{ppl} 0 | 0 |")
    floor = "".join(f" {mean_std([r['noise_floor']['kl'] for r in found[n]], 5)} | |" for n in tests)
    print(f"| noise floor (batch of 1) | | |{floor} | |")
    for method, shown in zip(METHODS, SHOWN):
        rows = {n: [m for r in found[n] for m in r["methods"] if m["name"] == method] for n in tests}
        first = rows[tests[0]]
        kept = [m["kept"] for m in first]
        cells = "".join(
            f" {mean_std([m['kl']['mean'] for m in rows[n]], 4)} | {mean_std([m['ppl']['prompt'] for m in rows[n]], 1)} |" for n in tests
        )
        share = mean_std([100 * k["share"] for k in kept], 1)
        realised, cut = (mean_std([m[key] for m in first], 3) for key in ("realised_sparsity", "flops_reduction"))
        print(f"| {shown} | {share} | {sum(k['items'] for k in kept)} |{cells} {realised} | {cut} |")


def main():
    args = arguments()
    if not args.tables:
        run(args)
    for budget, kv in itertools.product(map(float, args.budgets.split(",")), args.kv.split(",")):
        table(args, kv, budget)


if __name__ == "__main__":
    main()
