"""What does each method keep at 22, 30, 40 and 60 %, in both kv modes, over three seeds?  python experiments/budgets.py
--help

For every (kv, seed, budget): sensitivity, search with the static router, router training, fine-tuning, the stages of
`ftp-lightning run`, called in one process; then every method is measured on each test text. What is finished is not
done again, so the study goes on where it was stopped. Answers are scored as lm-eval's `ftp` scores them, the right
choice alone, contexts of one length together. `--worker I/N` takes every N-th cell (start N processes); `--tables` only
writes the tables of what is finished.
"""

import argparse
import itertools
import json
import os
import random
import statistics
from pathlib import Path

METHODS = ("random", "uniform", "block_influence", "static", "dynamic (before fine-tuning)", "dynamic")
SHOWN = (
    "random",
    "uniform",
    "Block Influence",
    "static, searched",
    "dynamic, before fine-tuning",
    "dynamic, fine-tuned",
)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument(
        "--calibration", default="embedded", help="text for sensitivity and search; used whole unless embedded"
    )
    parser.add_argument("--train", default="embedded", help="text to train the router on")
    parser.add_argument(
        "--test", action="append", metavar="NAME=SOURCE", help="test text; the first one also gets the recall questions"
    )
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


def chosen(parser, text, known, kind="method", separator=";"):
    """The names that a flag lists; what is none of `known` ends the script with status 2."""
    names = [name.strip() for name in text.split(separator)]
    if unknown := [name for name in names if name not in known]:
        listed = f"{separator} ".join(known)
        parser.error(f"there is no {kind} {', '.join(unknown)}; {kind}s: {listed}")
    return names


def whole(source):
    """Every text of ours is for one purpose, so all of it is used; the embedded stories have splits of their own."""
    return {"data": source, "split": "auto" if source == "embedded" else "all"}


def documents(source, part):
    """Those of a text of ours, whole; of the embedded stories the part."""
    from ftp_lightning.data.sources import load_documents

    return load_documents(source, part if source == "embedded" else "all")


def search_windows(tokenizer, source, part, count, seed, prompt_tokens=192, kinds=None):
    """Windows as searches and trainings have them: half of them with facts (of `kinds`, else of all), 64 tokens of
    continuation."""
    from ftp_lightning.data.windows import calibration_windows

    return calibration_windows(tokenizer, documents(source, part), prompt_tokens, 64, count, seed, kinds=kinds)


def tests_of(args):
    return dict(pair.split("=", 1) for pair in args.test or ["stories=embedded"])


def cell(args, kv, seed, budget):
    """All stages of one cell, in order."""
    from ftp_lightning.stages.search import SearchStage
    from ftp_lightning.stages.sensitivity import SensitivityStage
    from ftp_lightning.stages.train import TrainStage

    shared = {"model": args.model, "dtype": args.dtype, "seed": seed, "device": "cpu", "tracking": "none"}
    common, own = args.output / f"{kv}-seed{seed}", args.output / f"{kv}-seed{seed}-{budget}"
    measured = str(common / "sensitivity.json")
    search = {
        "budget": budget,
        "kv": kv,
        "sensitivity": measured,
        "offspring": 10,
        "windows": 24,
        **whole(args.calibration),
    }
    SensitivityStage(**shared, kv=kv, windows=8, output=str(common), **whole(args.calibration)).execute()
    SearchStage(**shared, **search, generations=args.generations, output=str(own / "search")).execute()
    schedule, trained, tuned = (str(own / p) for p in ("search/schedule.json", "train/pruned", "finetune/pruned"))
    train = whole(args.train) | (
        {"split": "auto"} if args.train != "embedded" else {}
    )  # validation comes from the same text
    TrainStage(
        **shared, kv=kv, schedule=schedule, steps=args.steps, validations=3, output=str(own / "train"), **train
    ).execute()
    tuning = {
        "generations": args.finetune_generations,
        "pruned": trained,
        "schedule": schedule,
        "output": str(own / "finetune"),
    }
    SearchStage(**shared, **search, **tuning).execute()
    for number, (name, source) in enumerate(tests_of(args).items()):
        target, sizes = own / f"test-{name}.json", [args.items, args.windows, args.dtype]
        if not target.exists() or json.loads(target.read_text())["sizes"] != sizes:
            test = Test(args, seed, source, recall=number == 0)
            pruners = methods(own, kv, seed, budget, measured)
            write(target, {"sizes": sizes} | {method: test.measure(pruner) for method, pruner in pruners.items()})
            write(own.parent / f"dense-{name}-seed{seed}.json", test.dense)


def methods(folder, kv, seed, budget, measured):
    """Name -> pruner, in the order of the tables."""
    from ftp_lightning import RandomRouter, Schedule, StaticRouter, TokenPruner
    from ftp_lightning.search.allocations import from_importance

    influence = json.loads(Path(measured).read_text())["block_influence"]
    even, searched = Schedule.uniform(len(influence), budget), Schedule.load(folder / "search/schedule.json")
    static = {"uniform": even, "block_influence": from_importance(influence, budget), "static": searched}
    return {
        "random": TokenPruner(RandomRouter(seed), even, kv=kv),
        **{name: TokenPruner(StaticRouter(), schedule, kv=kv) for name, schedule in static.items()},
        "dynamic (before fine-tuning)": TokenPruner.load(folder / "train/pruned"),
        "dynamic": TokenPruner.load(folder / "finetune/pruned"),
    }


def own_cells(args, cells):
    """Those that this process does; several processes have a thread each."""
    import torch

    index, workers = map(int, args.worker.split("/"))
    if workers > 1:
        torch.set_num_threads(1)
    return [cell for place, cell in enumerate(cells) if place % workers == index]


def cell_file(args, kv, budget, seed):
    """The file of a cell's rows, its folder made, and the rows that are finished, by method."""
    target = args.output / f"{kv}-{budget}-{seed}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    return target, json.loads(target.read_text()) if target.exists() else {}


def place_of(name):
    """A method's name as part of a file's."""
    return name.replace(", ", "-").replace(" + ", "+").replace(" ", "-")


def write(path, record):
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(record))
    os.replace(partial, path)


class Test:
    """A test text: windows for KL and perplexity, and questions on facts (of `kinds`, else of all) set into it;
    measured dense once per process."""

    known: dict = {}

    def __init__(self, args, seed, source, recall, kinds=None):
        about = (seed, source, kinds)
        if about not in self.known:
            self.known[about] = self._prepare(args, seed, source, recall, kinds)
        self.__dict__.update(self.known[about])

    def _prepare(self, args, seed, source, recall, kinds):
        from ftp_lightning.data.choices import recall_items
        from ftp_lightning.data.windows import plain_windows
        from ftp_lightning.evaluation.continuation import noise_floor, teacher_logprobs
        from ftp_lightning.evaluation.greedy import as_question
        from ftp_lightning.models import load

        self.model, self.tokenizer = load(args.model, dtype=args.dtype)
        texts = documents(source, "test")
        self.windows = plain_windows(self.tokenizer, texts, 192, 64, args.windows, random.Random(f"{seed}/windows"))
        self.teacher, floor = teacher_logprobs(self.model, self.windows, 16), noise_floor(self.model, self.windows, 16)
        rng = random.Random(f"{seed}/recall")
        items = recall_items(self.tokenizer, texts, rng, args.items, kinds=kinds) if recall else []
        self.questions = [as_question(self.tokenizer, item) for item in items]
        self.right = self.answers(self.questions)
        self.without = self.answers([as_question(self.tokenizer, item, "context_deleted") for item in items])
        answered = {"right": sum(self.right), "right without facts": sum(self.without), "questions": len(items)}
        self.dense = {"ppl": floor.dense_ppl, "noise": floor.kl_mean, **answered}
        return dict(self.__dict__)

    def answers(self, questions):
        """Whether the greedy answer to each is right."""
        from ftp_lightning.evaluation.greedy import greedy_answers

        return greedy_answers(self.model, questions)

    def measure(self, pruner):
        from dataclasses import asdict

        from ftp_lightning.evaluation.continuation import evaluate_rows
        from ftp_lightning.evaluation.statistics import kept
        from ftp_lightning.pruning.flops import realised_flops_reduction

        text = evaluate_rows(self.model, self.windows, pruner, batch_size=16, teacher=self.teacher)
        found = {"kl": text.kl_mean, "ppl": text.ppl, "kl_rows": text.kl_rows, "realised": text.mean_sparsity}
        cut = realised_flops_reduction(self.model, pruner.trace.prompt, pruner.kv, rank=pruner.skip_rank)
        found["flops_cut"] = cut  # of the last batch
        if not self.questions:
            return found
        with pruner(self.model):
            right = self.answers(self.questions)
        # which questions need the passage: dense answers them right with it, and wrong with the facts deleted
        need = [a and not b for a, b in zip(self.right, self.without)]
        return found | {"right": right, "need": need, "kept": asdict(kept(self.right, self.without, right))}


def run(args):
    import torch

    torch.set_num_threads(1)
    index, workers = map(int, args.worker.split("/"))
    cells = list(
        itertools.product(args.kv.split(","), map(int, args.seeds.split(",")), map(float, args.budgets.split(",")))
    )
    mine = [
        c
        for i, c in enumerate(itertools.groupby(cells, key=lambda c: c[:2]))
        for c in list(c[1])
        if i % workers == index
    ]
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
    seeds = [
        p.parent.name.split("-")[1] for p in sorted(args.output.glob(f"{kv}-seed*-{budget}/test-{tests[-1]}.json"))
    ]
    if not seeds:
        return
    read = lambda path: json.loads((args.output / path).read_text())  # noqa: E731
    found = {n: [read(f"{kv}-{seed}-{budget}/test-{n}.json") for seed in seeds] for n in tests}
    dense = {n: [read(f"dense-{n}-{seed}.json") for seed in seeds] for n in tests}
    print(f"\n### {budget:.0%}, `{kv}`, {len(seeds)} seed{'s' * (len(seeds) > 1)}\n")
    heads = "".join(f" KL {n} | PPL {n} |" for n in tests)
    print(
        f"| method | kept, % | answers |{heads} realised | FLOPs cut |\n|---|---|---|{'---|---|' * len(tests)}---|---|"
    )
    ppl = "".join(
        f" {mean_std([d['noise'] for d in dense[n]], 5)} | {mean_std([d['ppl'] for d in dense[n]], 1)} |" for n in tests
    )
    print(f"| dense (KL: noise floor) | 100 | |{ppl} 0 | 0 |")
    for method, shown in zip(METHODS, SHOWN):
        rows = {n: [r[method] for r in found[n]] for n in tests}
        first = rows[tests[0]]
        cells = "".join(
            f" {mean_std([m['kl'] for m in rows[n]], 4)} | {mean_std([m['ppl'] for m in rows[n]], 1)} |" for n in tests
        )
        share = mean_std([100 * m["kept"]["share"] for m in first], 1)
        realised, cut = (mean_std([m[key] for m in first], 3) for key in ("realised", "flops_cut"))
        print(f"| {shown} | {share} | {sum(m['kept']['items'] for m in first)} |{cells} {realised} | {cut} |")


PAIRS = (
    ("static", "random"),
    ("static", "uniform"),
    ("static", "block_influence"),
    ("dynamic (before fine-tuning)", "static"),
    ("dynamic", "dynamic (before fine-tuning)"),
    ("dynamic", "static"),
)


def answers(pairs):
    """(A, B, item, seed) of the questions that need the passage, of (A's row, B's row) of each seed. Every seed asks
    questions of its own."""
    return [
        (float(a), float(b), (seed, item), seed)
        for seed, (one, two) in enumerate(pairs)
        for item, (a, b, need) in enumerate(zip(one["right"], two["right"], one["need"]))
        if need
    ]


def interval(rows, digits, scale=1.0):
    """ "+1.2 [-0.3, +2.7]": A minus B of (A, B, item, seed), with its 95 % interval over items and seeds."""
    from ftp_lightning.evaluation.statistics import paired

    found = paired(*map(list, zip(*rows))).scaled(scale)
    ends = "" if found.low is None else f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"{found.value:+.{digits}f}{ends}"


def comparisons(args, kv):
    """Markdown rows: difference of kept answers in points, paired, with an interval over the finished seeds."""
    first, shown = next(iter(tests_of(args))), dict(zip(METHODS, SHOWN))
    budgets = sorted(map(float, args.budgets.split(",")))
    print(f"\n### Kept answers compared, `{kv}`: points, [95 % interval]\n")
    print(f"| A - B |{''.join(f' {b:.0%} |' for b in budgets)}\n|---|{'---|' * len(budgets)}")
    for a, b in PAIRS:
        cells = []
        for budget in budgets:
            paths = sorted(args.output.glob(f"{kv}-seed*-{budget}/test-{first}.json"))
            found = [json.loads(path.read_text()) for path in paths]
            rows = answers([(r[a], r[b]) for r in found])
            cells.append(interval(rows, 1, 100.0) if rows else "")
        print(f"| {shown[a]} - {shown[b]} | {' | '.join(cells)} |")


def main():
    args = arguments()
    if not args.tables:
        run(args)
    for budget, kv in itertools.product(map(float, args.budgets.split(",")), args.kv.split(",")):
        table(args, kv, budget)
    for kv in args.kv.split(","):
        comparisons(args, kv)


if __name__ == "__main__":
    main()
