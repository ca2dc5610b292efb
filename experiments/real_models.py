"""What does pruning keep on real models, method by method, at equal FLOPs of the prefill?

    python experiments/real_models.py --books BOOKS --squad xquad_en.jsonl --prompts PROMPTS.jsonl
    python experiments/real_models.py --tables                                # the tables of docs/real_models.md

BOOKS holds the folders `calibration` and `test` of text files; PROMPTS are what the model is to answer. Items come in
chunks of --items: every method is measured on the first chunk before the next one begins, so that the table is whole at
any time. Several processes may run the same command at once.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from ftp_lightning.studies.grid import Cell, arguments, pack, read_grid, run_grid, unpack
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


@dataclass(frozen=True)
class Real(Cell):
    model: str
    task: str
    chunk: int
    cut: float
    method: str


@dataclass(frozen=True)
class Bench:
    """What cells are measured on, made once per model and chunk."""

    output: Path
    books: str
    squad: str
    prompts: str
    items: int

    def measure(self, cell: Real) -> Any:
        """The record of one method on one chunk of one task."""
        bench = self.of(cell.model, cell.task, cell.chunk)
        if cell.method == "dense":
            return bench.dense
        return bench.measure(cell.method, self.pruner(cell.model, cell.method, cell.cut))

    @lru_cache(maxsize=1)  # noqa: B019  one bench lives as long as the process
    def of(self, model: str, task: str, chunk: int) -> Any:
        from ftp_lightning.stages.evaluate import EvaluateStage, bench_of

        about: dict[str, Any] = {"model": model, "prompt_tokens": MODELS[model], "seed": chunk, "items": self.items}
        about |= {"data": f"{self.books}/test", "split": "all", "batch_size": 4, "windows": self.items}
        if task == "own_answers":
            about |= {"rows": task, "data": self.prompts, "continuation_tokens": 24, "tasks": ()}
        else:
            about |= {"apply_chat_template": task in TEMPLATED.get(model, ()), "task_data": self.squad, "windows": 1}
            about |= {"tasks": (task,), "continuation_tokens": 8}
        return bench_of(EvaluateStage(**about), *self.model(model), None, self.output / "answers")

    @cache  # noqa: B019
    def pruner(self, model: str, method: str, cut: float) -> Any:
        """The method where a prompt of the model's length saves `cut` of its FLOPs."""
        from ftp_lightning.baselines.registry import METHODS as REGISTRY
        from ftp_lightning.baselines.registry import Profile
        from ftp_lightning.studies.calibrated import keep_order

        setting = self.setting(model)
        pruner = REGISTRY[method].place(setting, cut, Profile(MODELS[model]))
        keep_order(setting, self.output / model)
        return pruner

    @lru_cache(maxsize=1)  # noqa: B019
    def setting(self, model: str) -> Any:
        """What methods may look at, measured once on the calibration books and kept in OUTPUT/MODEL."""
        from ftp_lightning.studies.calibrated import calibrated

        about: dict[str, Any] = {"model": model, "data": f"{self.books}/calibration", "split": "all"}
        return calibrated(self.model(model), self.output / model, **about)

    @lru_cache(maxsize=1)  # noqa: B019
    def model(self, name: str) -> tuple[Any, Any]:
        from ftp_lightning.models import load

        return load(name)


def cells(args: argparse.Namespace) -> list[Real]:
    asked = {name: getattr(args, name).split(",") for name in ("models", "methods", "cuts") if getattr(args, name)}
    methods, cuts = asked.get("methods", METHODS), [float(cut) for cut in asked.get("cuts", CUTS)]
    return [
        Real(model, task, chunk, cut, method)
        for chunk in range(args.chunks)
        for model in asked.get("models", MODELS)
        for cut, method in [(0.0, "dense"), *((cut, method) for cut in cuts for method in methods)]
        for task in TASKS[model]
    ]


def main() -> None:
    output = "runs/real_models"
    args = arguments(
        __doc__, output, books="", squad="", prompts="", models="", methods="", cuts="", items=25, chunks=8
    )
    grid, bench = cells(args), Bench(args.output, args.books, args.squad, args.prompts, args.items)
    if args.packed and args.packed.exists():
        unpack(args.packed, args.output)
    if not args.tables:
        run_grid(grid, bench.measure, args.output)
    if args.packed:
        pack(args.output, args.packed, ("answers", "hash", "metric", "label", "id"))
    print(kept_table(read_grid(grid, args.output)))


if __name__ == "__main__":
    main()
