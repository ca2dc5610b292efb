"""What does pruning keep on real models, method by method, at equal FLOPs of the prefill?

    python experiments/real_models.py --books BOOKS --squad xquad_en.jsonl     # several of these share the work
    python experiments/real_models.py --tables                                # the tables of docs/real_models.md

BOOKS: a folder with folders `calibration` and `test` of text files, the haystacks. Items come in chunks of --items: all
methods are measured on the first chunk, then on the next, so that the table is whole at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import pandas

from ftp_lightning.studies.grid import Cell, arguments, read_grid, run_grid

MODELS = {"smollm2-135m-instruct": 1000, "gemma3-270m": 1000, "embedded": 440}
"""Model -> tokens of its prompts: the embedded one has 512 positions."""
TASKS = {
    "smollm2-135m-instruct": ("ruler_niah_multikey", "squad", "own_answers", "lambada_stories"),
    "gemma3-270m": ("ruler_niah_multikey", "squad", "own_answers", "lambada_stories"),
    "embedded": ("multi_key_recall", "own_answers"),
}
CUTS = (0.1, 0.2, 0.3, 0.4)
METHODS = (
    "recent_sink", "deletion_recent", "first_dense", "late_blocks", "random", "default", "static", "short_gpt",
    "block_pruner", "fast_kv", "gem_filter",
)  # fmt: skip


@dataclass(frozen=True)
class Real(Cell):
    model: str
    task: str
    chunk: int
    cut: float
    method: str


def cells(args: Any) -> list[Real]:
    """Chunk by chunk; a second process begins with the next model."""
    models, methods = (
        [name for name in known if not asked or name in asked.split(",")]
        for known, asked in ((MODELS, args.models), (METHODS, args.methods))
    )
    return [
        Real(model, task, chunk, cut, method)
        for chunk in range(args.chunks)
        for model in models
        for task in TASKS[model]
        for cut, method in [(0.0, "dense"), *((cut, method) for cut in CUTS for method in methods)]
    ]


def measure(cell: Real, args: Any) -> Any:
    """The record of one method on one chunk of one task."""
    bench = bench_of(cell.model, cell.task, cell.chunk, args)
    if cell.method == "dense":
        return bench.dense
    return bench.measure(cell.method, pruner_of(cell.model, cell.method, cell.cut, args))


@lru_cache(maxsize=1)
def model_of(name: str) -> Any:
    from ftp_lightning.models import load

    return load(name)


@cache
def pruner_of(model: str, method: str, cut: float, args: Any) -> Any:
    """The method where a prompt of the model's length saves `cut` of its FLOPs."""
    from ftp_lightning.baselines.registry import METHODS as REGISTRY
    from ftp_lightning.baselines.registry import Profile
    from ftp_lightning.studies.calibrated import keep_order

    setting = setting_of(model, args)
    pruner = REGISTRY[method].place(setting, cut, Profile(MODELS[model]))
    keep_order(setting, args.output / model)
    return pruner


@lru_cache(maxsize=1)
def setting_of(model: str, args: Any) -> Any:
    """What methods may look at, measured once on the calibration books and kept in OUTPUT/MODEL."""
    from ftp_lightning.studies.calibrated import calibrated

    return calibrated(model_of(model), args.output / model, model=model, data=f"{args.books}/calibration", split="all")


@lru_cache(maxsize=1)
def bench_of(model: str, task: str, chunk: int, args: Any) -> Any:
    from ftp_lightning.stages.evaluate import EvaluateStage
    from ftp_lightning.stages.evaluate import bench_of as evaluated

    loaded, books = model_of(model), f"{args.books}/test"
    about: dict[str, Any] = {"model": model, "prompt_tokens": MODELS[model], "seed": chunk, "items": args.items}
    about |= {"data": books, "split": "all", "batch_size": 4, "apply_chat_template": "instruct" in model}
    if task == "own_answers":
        about |= {"rows": "own_answers", "continuation_tokens": 24, "windows": args.items, "tasks": ()}
    else:
        about |= {"tasks": (task,), "task_data": args.squad or None, "windows": 1, "continuation_tokens": 8}
    return evaluated(EvaluateStage(**about), *loaded, None, args.output / "answers")


def tables(items: Any) -> str:
    """Markdown: one table per model and task; a row per method, a column per cut."""
    from ftp_lightning.evaluation.record import flops_cut, kept

    shown = []
    for (model, task), own in items.groupby(["model", "task"], sort=False):
        rows = {}
        for (method, cut), found in own[own["method"] != "dense"].groupby(["method", "cut"], sort=False):
            share = kept(found).scaled(100)
            cell = f"{share.value:.0f} [{share.low:.0f}, {share.high:.0f}]" if share.low is not None else "–"
            rows.setdefault(method, {})[f"{cut:.0%}"] = f"{cell} ({flops_cut(found):.0%})"
        frame = pandas.DataFrame(rows).T
        shown.append(f"### {model}, {task}\n\n{frame.to_markdown()}\n")
    return "\n".join(shown)


def main() -> None:
    args = arguments(__doc__, "runs/real_models", books="", squad="", models="", methods="", items=25, chunks=1)
    grid = cells(args)
    if not args.tables:
        run_grid(grid, lambda cell: measure(cell, args), args.output)
    print(tables(read_grid(grid, args.output)))


if __name__ == "__main__":
    main()
