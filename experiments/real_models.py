"""What does pruning keep on real models, method by method, at equal FLOPs of the prefill?

    python experiments/real_models.py --books BOOKS --squad xquad_en.jsonl
    python experiments/real_models.py --tables     # the tables of docs/real_models.md, from what is published

BOOKS holds the folders `calibration`, `validation` and `test` of text files. The model's own answers are those to
SQuAD's passages and questions, or to --prompts FILE.
Items come in chunks of --items: every method is measured on the first chunk before the next one begins, so that the
table is whole at any time. Several processes may run the same command at once.
"""

from __future__ import annotations

import argparse

from ftp_lightning.studies.comparison import Compared, Comparison
from ftp_lightning.studies.grid import arguments, finished, sentences
from ftp_lightning.studies.method_table import kept_table

MODELS = {"smollm2-135m-instruct": 1000, "gemma3-270m": 1000, "embedded": 440}
"""Model -> tokens of its prompts: the embedded one has 512 positions."""
REAL = ("ruler_niah_multikey", "squad", "own_answers", "lambada_stories")
TASKS = dict.fromkeys(MODELS, REAL) | {"embedded": ("multi_key_recall", "own_answers")}
TEMPLATED = {"smollm2-135m-instruct": ("ruler_niah_multikey", "squad")}
CUTS = (0.2, 0.4, 0.3, 0.1)
METHODS = (
    "default", "late_blocks", "first_dense", "fast_kv", "static", "gem_filter", "deletion_recent", "recent_sink",
    "random", "short_gpt", "block_pruner",
)  # fmt: skip
PACKED = "experiments/found/real_models.jsonl.xz"


def cells(args: argparse.Namespace) -> list[Compared]:
    asked = {name: getattr(args, name).split(",") for name in ("models", "methods", "cuts") if getattr(args, name)}
    methods, cuts = asked.get("methods", METHODS), [float(cut) for cut in asked.get("cuts", CUTS)]
    return [
        Compared(model, task, chunk, cut, method)
        for chunk in range(args.chunks)
        for model in asked.get("models", MODELS)
        for cut, method in [(0.0, "dense"), *((cut, method) for cut in cuts for method in methods)]
        for task in TASKS[model]
    ]


def main() -> None:
    files = {"books": "", "squad": "", "prompts": ""}
    args = arguments(__doc__, "runs/real_models", PACKED, **files, models="", methods="", cuts="", items=25, chunks=8)
    about = (args.books, args.squad, args.prompts, args.items, tuple(MODELS.items()), tuple(TEMPLATED.items()))
    with sentences():
        print(kept_table(finished(cells(args), Comparison(args.output, *about).measure, args)))


if __name__ == "__main__":
    main()
