"""Has a trained router learnt the sentence forms of its training?  python experiments/other_forms.py --help

Facts come in five forms (`ftp_lightning/data/words.py`). Here search, training and validation see facts of `--forms`
alone, and everything is measured on passages whose facts are all of `--asked`: other sentences, questions and words. A
router that had learnt the sentences of its training would fall back to the static one there.

* static, searched; projected; paper: as in experiments/routers.py, with as many steps and forward tokens, on those
  forms.
* M, all forms: the pruner that experiments/routers.py found with all five forms (`--known`), measured on the same
  passages: what knowing the asked forms is worth.

What is finished is not done again. `--worker I/N` takes every N-th cell; `--tables` only writes the tables.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import budgets as study
import routers
import schedules as searches

FOUND = ("static, searched", "paper", "projected")
METHODS = [*FOUND, *(f"{name}, all forms" for name in FOUND)]
PAIRS = [("projected", "static, searched"), ("projected, all forms", "static, searched, all forms")]
PAIRS += [("paper", "static, searched"), ("paper, all forms", "static, searched, all forms")]
PAIRS += [(name, f"{name}, all forms") for name in FOUND]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", default="place,trade,town", help="of facts in search, training and validation")
    parser.add_argument("--asked", default="colour,called", help="forms of facts that everything is measured on")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--calibration", default="embedded", help="text to train and search on")
    parser.add_argument("--validation", default="embedded", help="text that the best state is chosen on")
    parser.add_argument("--test", action="append", metavar="NAME=SOURCE", help="test text, also of the questions")
    parser.add_argument("--known", type=Path, default=Path("runs/routers"), help="output of experiments/routers.py")
    parser.add_argument("--budgets", default="0.6")
    parser.add_argument("--kv", default="keep")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=250_000, help="forward tokens of a search")
    parser.add_argument("--calibration_windows", type=int, default=32)
    parser.add_argument("--dense", type=int, default=2, help="first blocks that are dense in the first training")
    parser.add_argument("--items", type=int, default=300, help="recall questions per seed")
    parser.add_argument("--windows", type=int, default=24, help="windows of test text per seed")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", default="; ".join(METHODS), help="separated by ;")
    parser.add_argument("--output", type=Path, default=Path("runs/other_forms"))
    parser.add_argument("--worker", default="0/1")
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    args.static = Path("no schedule is taken from elsewhere")
    args.forms, args.asked = tuple(args.forms.split(",")), tuple(args.asked.split(","))
    args.methods = study.chosen(parser, args.methods, METHODS)
    if both := set(args.forms) & set(args.asked):
        parser.error(f"{', '.join(sorted(both))} is in --forms and in --asked; nothing would be new to the router")
    return args


class Cell(routers.Cell):
    """Text, training and search, with facts of `--forms` alone."""

    def windows(self, source, part, count, seed):
        return study.search_windows(self.tokenizer, source, part, count, seed, kinds=self.args.forms)


def find(args, cell, name, folder):
    """The pruner of a method; None where `--known` has none."""
    from ftp_lightning import TokenPruner

    if name in FOUND:
        return cell.find(name, folder)[0]
    known = args.known / f"{cell.kv}-{cell.budget}-{cell.seed}-{study.place_of(name.removesuffix(', all forms'))}"
    return TokenPruner.load(known / "pruned") if (known / "pruned").exists() else None


def run_cell(args, kv, budget, seed):
    target, known = study.cell_file(args, kv, budget, seed)
    if all(name in known for name in args.methods):
        return
    cell, (test, held) = Cell(args, kv, budget, seed), searches.tests_for(args, seed, args.asked)
    for name in args.methods:
        folder = routers.folder_of(args, kv, budget, seed, name)
        pruner = None if name in known else find(args, cell, name, folder)
        if pruner is None:
            continue
        row = test.measure(pruner) | {part: held.measure(part, pruner) for part in searches.HELD}
        if name in FOUND:
            pruner.save(folder / "pruned")
        known[name] = searches.compact(row | {"parameters": pruner.router.parameter_count})
        study.write(target, known)
        print(
            f"{kv} {budget:.0%} seed {seed} {name}: held out {row['held']['kl']:.4f}, kept {row['kept']['share']:.3f}",
            flush=True,
        )


def tables(args, kv, budget):
    """Markdown: each method, mean and std over its seeds; then what one keeps over another, paired."""
    cells = [json.loads(path.read_text()) for path in sorted(args.output.glob(f"{kv}-{budget}-*.json"))]
    if not cells:
        return
    print(f"\n### {budget:.0%}, `{kv}`, facts of forms {', '.join(args.asked)}\n")
    print("| router | seeds | parameters | held-out KL | KL at twice the length | KL of prose | kept, % | FLOPs cut |")
    print("|---" * 8 + "|")
    for name in METHODS:
        having = [cell for cell in cells if name in cell]
        if having:
            print(f"| {name} | {len(having)} | {' | '.join(routers.table_row(having, name, name)[:6])} |")
    print("\n| A - B | held-out KL | kept, points |\n|---|---|---|")
    for one, other in PAIRS:
        having = [cell for cell in cells if one in cell and other in cell]
        if having:
            print(f"| {one} - {other} | {' | '.join(searches.paired(having, one, other))} |")


def main():
    args = arguments()
    if not args.tables:
        for cell in searches.cells_of(args):
            run_cell(args, *cell)
    for budget, kv in itertools.product(map(float, args.budgets.split(",")), args.kv.split(",")):
        tables(args, kv, budget)


if __name__ == "__main__":
    main()
