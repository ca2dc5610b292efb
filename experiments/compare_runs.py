"""On which items do two evaluations differ, and can it be told from chance?

    python experiments/compare_runs.py runs/a runs/b [--a METHOD] [--b METHOD] [--show 10]

Reads the record.jsonl of both. Items are the same where the very same words were asked (`hash`); others are counted and
left out. Methods are by default the last of each run. Shows McNemar's test and an interval over documents for each
task, then the items that changed.
"""

from __future__ import annotations

import argparse
from typing import Any

from ftp_lightning.errors import UserError
from ftp_lightning.studies.grid import sentences


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="folder of `evaluate`, or its record.jsonl")
    parser.add_argument("second")
    parser.add_argument("--a", help="method of the first run")
    parser.add_argument("--b", help="method of the second run")
    parser.add_argument("--show", type=int, default=10, help="changed items to list per task")
    return parser.parse_args()


def method_of(items: Any, asked: str | None, run: str) -> str:
    """The method asked for, else the last one that answered tasks."""
    scored = items[items["score"].notna()] if "score" in items else items.iloc[:0]
    known = list(dict.fromkeys(scored["method"]))
    if not known:
        raise UserError(f"{run} scored no item\nGive a run with tasks.")
    if asked is not None and asked not in known:
        raise UserError(f"{run} has no method {asked!r}\nIt has {', '.join(known)}.")
    return asked or [name for name in known if not name.endswith("(sequence)")][-1]


def report(args: argparse.Namespace) -> None:
    from ftp_lightning.evaluation.pairing import compare, record_of, side_by_side
    from ftp_lightning.evaluation.record import pairs
    from ftp_lightning.evaluation.tables import pairs_table

    first, second = record_of(args.first), record_of(args.second)
    a, b = method_of(first, args.a, args.first), method_of(second, args.b, args.second)
    items, alone = side_by_side(first, second, a, b)
    print(f"A: {a} of {args.first}. B: {b} of {args.second}. {len(items) // 2} items in both, {alone} in one only.\n")
    found = compare(items, "A", "B")
    print(pairs_table({"paired": found}).markdown())
    for task in (pair["task"] for pair in found):
        own = pairs(items[items["task"] == task], "A", "B", "right")
        changed = own[own["a"] != own["b"]]
        for row in changed.head(args.show).itertuples():
            print(f"{task} {row.item[0]}: {'gained' if row.a else 'lost'} by A")
        if len(changed) > args.show:
            print(f"{task}: {len(changed) - args.show} more")


def main() -> None:
    with sentences():
        report(arguments())


if __name__ == "__main__":
    main()
