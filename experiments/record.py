"""What do pruners keep of real models' answers? Rebuilds the tables of docs/record.md, and measures more.

    python experiments/record.py --tables                                          # SmolLM2, from what is published
    python experiments/record.py --tables --model gemma3-270m --split validation   # Gemma
    python experiments/record.py --tables --tasks few-shot,choice,story,code       # prompts that nothing was tuned on
    python experiments/record.py --books BOOKS --squad xquad_en.jsonl --task_data TASKS   # goes on
    python experiments/record.py --books BOOKS --squad xquad_en.jsonl --model gemma3-270m --methods "11-17;12-17"
    python experiments/record.py … --pruned runs/tune/pruned --budget 0.3 --packed mine.xz

BOOKS holds the folders `calibration`, `validation` and `test` of text files, TASKS the files that
`ftp_lightning.studies.other_prompts` names. Methods are separated by semicolons; `ftp_lightning.studies.record_study`
says how they are named. Several processes may run the same command at once.
"""

from __future__ import annotations

import argparse

from ftp_lightning.studies.grid import arguments, finished, sentences
from ftp_lightning.studies.other_prompts import KINDS
from ftp_lightning.studies.record_questions import Asked, Sources
from ftp_lightning.studies.record_study import Recorded, RecordStudy, differences, record_table

SMOL, GEMMA = "smollm2-135m-instruct", "gemma3-270m"
OTHER = tuple((kind, 100) for kind in KINDS)
ASKED = {
    SMOL: Asked((("needles-900-1000", 30), ("xquad", 60), ("own", 60), *OTHER)),
    GEMMA: Asked(
        (("needles-380-380", 48), ("xquad", 48), ("prose", 36), ("needles-1000-1000", 24), ("own", 24), *OTHER),
        2,
        12,
        False,
    ),
}
SPREAD = "12,14,18,20-29"
READY = [f"{SMOL} at {budget}" for budget in ("0.433333", "0.333333", "0.233333", "0.133333")]
SHARED = f"{SMOL} shared at 0.133333"
METHODS = {
    SMOL: ["17-29", "17-29 fitted 56", f"{SPREAD} fitted 36", *READY[:-1], SHARED, READY[-1]],
    GEMMA: ["11-17", "12-17", "14-17"],
}
PAIRS = {
    SMOL: [
        (READY[0], f"{SPREAD} fitted 36"), (f"{SPREAD} fitted 36", "17-29 fitted 56"), ("17-29 fitted 56", "17-29"),
        (READY[1], READY[0]), (READY[3], SHARED),
    ],
    GEMMA: [("12-17", "11-17")],
}  # fmt: skip
PACKED, CHUNK = "experiments/found/record.jsonl.xz", 5


def cells(args: argparse.Namespace, model: str) -> list[Recorded]:
    methods = [one.strip() for one in args.methods.split(";") if one.strip()] or METHODS[model]
    if args.pruned:
        methods = [f"{args.pruned} at {args.budget}"]
    tasks = args.tasks.split(",") if args.tasks else ASKED[model].fitted_on
    counts = [(task, min(count, args.limit or count)) for task, count in ASKED[model].counts if task in tasks]
    return [
        Recorded(model, args.split, task, chunk, method)
        for chunk in range(args.chunks)
        for task, count in counts
        for method in methods
        if chunk * CHUNK < count
    ]


def main() -> None:
    about = {"books": "", "squad": "", "task_data": "", "model": "", "methods": "", "pruned": "", "budget": 0.2}
    args = arguments(__doc__, "runs/record", PACKED, **about, split="test", tasks="", chunks=20, limit=0)
    study = RecordStudy(tuple(ASKED.items()), Sources(args.books, args.squad, args.task_data), CHUNK)
    with sentences():
        model = args.model or SMOL
        found = finished(cells(args, model), study.measure, args)
        print(f"### {model}, {args.split}\n\n{record_table(found)}\n")
        known = [pair for pair in PAIRS[model] if set(pair) <= set(found["method"])]
        print(f"{differences(found, known)}\n" if known else "")


if __name__ == "__main__":
    main()
