"""Experiments over kv modes, cuts, seeds and methods: answers kept and KL on test text of each seed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftp_lightning.lock import locked
from ftp_lightning.studies.grid import Cell, arguments, finished, sentences
from ftp_lightning.studies.method_table import kept_table

if TYPE_CHECKING:
    from ftp_lightning.evaluation.bench import Bench
    from ftp_lightning.pruning import TokenPruner

PROMPT = 192
SIZES = {"calibration": 32, "generations": 15, "items": 200, "windows": 64, "seeds": 3}


@dataclass(frozen=True)
class Seeded(Cell):
    """One method in one kv mode. `cut`: share of a prompt's FLOPs that is to be saved, see `search --budget_kind`."""

    kv: str
    cut: float
    seed: int
    method: str


Find = Callable[[argparse.Namespace, Seeded], "tuple[TokenPruner, dict[str, Any]]"]
"""The pruner of a cell, and columns to add to its record."""


def recall_study(doc: str | None, output: str, methods: Iterable[str], find: Find, **flags: Any) -> None:
    """The whole experiment: flags, grid, measurements and tables. `flags`: those that `find` needs besides `SIZES`."""
    names = {"model": "embedded", "data": "embedded", "test": "embedded", "methods": ",".join(methods)}
    args = arguments(doc, output, None, **names, kv="keep,evict", cuts="0.2,0.3,0.5", **SIZES, **flags)
    cuts = [float(cut) for cut in args.cuts.split(",")]
    every = product(range(args.seeds), args.kv.split(","), cuts, args.methods.split(","))
    grid = [Seeded(kv, cut, seed, method) for seed, kv, cut, method in every]

    def measure(cell: Seeded) -> Any:
        pruner, columns = find(args, cell)
        place = str(args.output / "answers")
        bench = _bench(args.model, args.test, args.items, args.windows, cell.seed, place)
        return bench.measure(cell.method, pruner, cell.seed).assign(**columns)

    with sentences():
        found = finished(grid, measure, args)
    print(kept_table(found, by=("kv", "task")))
    text = found[found["task"] == "text"]
    for column in (name for name in ("kl", "forward_tokens") if name in text):
        print(f"Mean {column}\n\n{text.pivot_table(column, 'method', ['kv', 'cut']).to_markdown()}\n")


def searched(args: argparse.Namespace, cell: Seeded, place: Path, **flags: Any) -> Path:
    """The folder of the search on calibration text of the seed, carried out once by one process.

    `place` is locked, so it cannot have the name of the cell, which is locked already.
    """
    from ftp_lightning.stages.search import SearchStage

    cut: dict[str, Any] = {"budget": cell.cut, "budget_kind": "flops", "budget_length": PROMPT}
    search = calibration(args, cell) | cut | {"generations": args.generations} | flags
    with locked(place):
        return SearchStage(**search, output=str(place)).execute()


def calibration(args: argparse.Namespace, cell: Seeded) -> dict[str, Any]:
    """What every stage on calibration text is told."""
    return {"model": args.model, "data": args.data, "seed": cell.seed, "kv": cell.kv, "windows": args.calibration}


@cache
def _bench(model: str, test: str, items: int, windows: int, seed: int, answers: str) -> Bench:
    from ftp_lightning.models import load
    from ftp_lightning.stages.evaluate import EvaluateStage, bench_of

    split = "auto" if test == "embedded" else "all"
    about: dict[str, Any] = {"model": model, "data": test, "split": split, "seed": seed, "tasks": ("story_recall",)}
    stage = EvaluateStage(**about, items=items, windows=windows, prompt_tokens=PROMPT)
    return bench_of(stage, *load(model), None, Path(answers))
