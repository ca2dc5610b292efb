"""Does it matter which text a schedule is searched on?  python experiments/calibration_data.py --help

For every seed and kv mode a schedule of one budget is searched, with the static router and the search's default
settings, on windows of each kind of text: each text given by `--text`, the first one also with facts set into it and
asked for (half of the windows: `mixed`, the search's default; all: `recall`), and random tokens. Every schedule found
is then measured on new windows of every kind, and on questions that need something far back in the prompt, as
experiments/budgets.py asks them. `uniform` is searched on nothing.

What is finished is not done again. `--worker I/N` takes every N-th cell (start N processes); `--tables` only prints the
table of what is finished.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import budgets as study

PROMPT, CONTINUATION = 192, 64


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument(
        "--text", action="append", metavar="NAME=CALIBRATION[,TEST]",
        help="a kind of text; without TEST, parts of CALIBRATION are used. The first one is that of the questions",
    )  # fmt: skip
    parser.add_argument("--budget", type=float, default=0.4)
    parser.add_argument("--kv", default="keep,evict")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--calibration_windows", type=int, default=32)
    parser.add_argument("--items", type=int, default=700, help="recall questions per seed")
    parser.add_argument("--windows", type=int, default=48, help="windows of every kind of test text, per seed")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("runs/calibration_data"))
    parser.add_argument("--worker", default="0/1")
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    args.text = [pair.partition("=")[::2] for pair in args.text or ["stories=embedded"]]
    if args.text[0][1] != "embedded" and "," not in args.text[0][1]:
        parser.error("the first --text needs a TEST of its own: NAME=CALIBRATION,TEST")
    return args


def kinds(args):
    """Names of the kinds of windows, as rows and columns of the table."""
    return ["mixed", "recall", *(name for name, _ in args.text), "random tokens"]


def documents(source, part):
    """Those of the calibration or the test part of CALIBRATION[,TEST]."""
    from ftp_lightning.data.sources import load_documents

    calibration, _, test = source.partition(",")
    if test:
        return load_documents(test if part == "test" else calibration, "all")
    return load_documents(calibration, part)


def windows_of(args, tokenizer, kind, part, count, seed):
    """Windows of one kind, of the calibration or the test part."""
    from ftp_lightning.data.windows import calibration_windows

    shares, texts = {"mixed": 0.5, "recall": 1.0}, dict(args.text)
    source = texts.get(kind, args.text[0][1])
    found = documents(source, part)
    windows = calibration_windows(
        tokenizer, found, PROMPT, CONTINUATION, count, 2 * seed + (part == "test"), shares.get(kind, 0.0)
    )
    if kind != "random tokens":
        return windows
    import torch

    from ftp_lightning.data.rows import Rows

    noise = torch.Generator().manual_seed(2 * seed + (part == "test"))
    ids = torch.randint(len(tokenizer), windows.input_ids.shape, generator=noise)
    ids[:, 0] = windows.input_ids[:, 0]
    return Rows.even(ids, PROMPT, windows.kinds, windows.documents)


def make_pruner(kv):
    from ftp_lightning import StaticRouter, TokenPruner

    return lambda schedule: TokenPruner(StaticRouter(), schedule, kv=kv)


def search(args, model, tokenizer, kv, kind, seed):
    """Schedule and calibration KL found on one kind of text."""
    from ftp_lightning.search.allocate import AllocationRequest, seed_allocations
    from ftp_lightning.search.fitness import ContinuationFitness
    from ftp_lightning.search.genetic import genetic_search
    from ftp_lightning.search.settings import SearchSettings

    blocks = model.config.num_hidden_layers
    windows = windows_of(args, tokenizer, kind, "calibration", args.calibration_windows, seed)
    fitness = ContinuationFitness(model, windows, make_pruner(kv))
    seeds = seed_allocations(AllocationRequest(num_blocks=blocks, budget=args.budget, seed=seed, kv=kv))
    found = genetic_search(fitness, blocks, SearchSettings(budget=args.budget, seed=seed), seeds)
    return {"sparsity": list(found.schedule.sparsity), "calibration": found.value}


def run_cell(args, kv, seed):
    """Search on every kind what was not yet, measure everywhere."""
    from ftp_lightning import Schedule
    from ftp_lightning.evaluation.continuation import evaluate_rows, teacher_logprobs

    target, known = study.cell_file(args, kv, args.budget, seed)
    missing = [kind for kind in ["uniform", *kinds(args)] if kind not in known]
    if not missing:
        return
    calibration, _, test = args.text[0][1].partition(",")
    questions = study.Test(args, seed, test or calibration, recall=True)
    model, tokenizer = questions.model, questions.tokenizer
    held = {kind: windows_of(args, tokenizer, kind, "test", args.windows, seed) for kind in kinds(args)}
    teachers = {kind: teacher_logprobs(model, windows, 8) for kind, windows in held.items()}
    for kind in missing:
        even = Schedule.uniform(model.config.num_hidden_layers, args.budget)
        row = {"sparsity": list(even.sparsity)}
        if kind != "uniform":
            row = search(args, model, tokenizer, kv, kind, seed)
        pruner = make_pruner(kv)(Schedule(row["sparsity"]))
        row |= {
            name: evaluate_rows(model, windows, pruner, batch_size=8, teacher=teachers[name]).kl_mean
            for name, windows in held.items()
        }
        known[kind] = row | {"kept": questions.measure(pruner)["kept"]["share"]}
        study.write(target, known)
        print(f"{kv} seed {seed}, searched on {kind}: kept {known[kind]['kept']:.3f}", flush=True)


def run(args):
    cells = itertools.product(map(int, args.seeds.split(",")), args.kv.split(","))
    for seed, kv in study.own_cells(args, cells):
        run_cell(args, kv, seed)


def table(args, kv):
    """Markdown: searched on each kind, tested on each; mean and std over the seeds that are finished."""
    found = [json.loads(path.read_text()) for path in sorted(args.output.glob(f"{kv}-{args.budget}-*.json"))]
    rows = ["uniform", *kinds(args)]
    found = [cell for cell in found if cell.keys() >= set(rows)]
    if not found:
        return
    print(f"\n### {args.budget:.0%}, `{kv}`, {len(found)} seeds\n")
    print(f"| searched on | kept, % |{''.join(f' KL, {kind} |' for kind in kinds(args))}\n|{'---|' * (len(rows) + 1)}")
    for kind in rows:
        kept = study.mean_std([100 * cell[kind]["kept"] for cell in found], 1)
        losses = [study.mean_std([cell[kind][name] for cell in found], 4) for name in kinds(args)]
        print(f"| {kind} | {kept} | {' | '.join(losses)} |")


def main():
    args = arguments()
    if not args.tables:
        run(args)
    for kv in args.kv.split(","):
        table(args, kv)


if __name__ == "__main__":
    main()
