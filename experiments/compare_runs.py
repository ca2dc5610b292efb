"""On which items do two evaluations differ, and can it be told from chance?

    python experiments/compare_runs.py runs/a runs/b [--a METHOD] [--b METHOD] [--show 10]

Reads the samples.jsonl of both. Items are the same where the very same words were asked (`hash`); others are counted
and left out. Methods are by default the last of each run. McNemar's test and an interval over documents, per task; then
the items that changed.
"""

import argparse


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="folder of `evaluate`, or its samples.jsonl")
    parser.add_argument("second")
    parser.add_argument("--a", help="method of the first run")
    parser.add_argument("--b", help="method of the second run")
    parser.add_argument("--show", type=int, default=10, help="changed items to list per task")
    return parser.parse_args()


def method_of(rows, asked, run):
    from ftp_lightning.errors import UserError
    from ftp_lightning.evaluation.pairing import methods_in

    known = [name for name in methods_in(rows) if not name.endswith("(sequence)")]
    if asked is not None and asked not in methods_in(rows):
        raise UserError(f"{run} has no method {asked!r}\nIt has {', '.join(methods_in(rows))}.")
    if not known:
        raise UserError(f"{run} scored no item\nGive a run with tasks.")
    return asked or known[-1]


def changed(rows, task):
    """Items that one of the two answers right and the other does not."""
    return [row for row in rows if row["task"] == task and bool(row["right"]["A"]) != bool(row["right"]["B"])]


def report(args):
    from dataclasses import asdict

    from ftp_lightning.evaluation.pairing import compare, joined, read_samples
    from ftp_lightning.evaluation.result_tables import pairs_table

    first, second = read_samples(args.first), read_samples(args.second)
    a, b = method_of(first, args.a, args.first), method_of(second, args.b, args.second)
    rows, alone = joined(first, second, a, b)
    print(f"A: {a} of {args.first}. B: {b} of {args.second}. {len(rows)} items in both, {alone} in one only.\n")
    pairs = compare(rows, "A", "B")
    print(pairs_table({"paired": [asdict(pair) for pair in pairs]}).markdown())
    for pair in pairs:
        items = changed(rows, pair.task)
        for row in items[: args.show]:
            print(f"{pair.task} {row['id']}: {'gained' if row['right']['A'] else 'lost'} by A")
        if len(items) > args.show:
            print(f"{pair.task}: {len(items) - args.show} more")


def main():
    import sys

    from ftp_lightning.errors import UserError

    try:
        report(arguments())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
