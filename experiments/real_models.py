"""What does pruning keep on real models, method by method, at equal FLOPs of the prefill?

    python experiments/real_models.py --books BOOKS --squad xquad_en.jsonl     # several of these share the work
    python experiments/real_models.py --tables                                # the tables of docs/real_models.md

BOOKS: a folder with folders `calibration` and `test` of text files, the haystacks. Items come in chunks of --items: all
methods are measured on the first chunk, then on the next, so that the table is whole at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ftp_lightning.studies.grid import Cell

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
    models = [name for name in MODELS if not args.models or name in args.models.split(",")]
    return [
        Real(model, task, chunk, cut, method)
        for chunk in range(args.chunks)
        for model in models
        for task in TASKS[model]
        for cut, method in [(0.0, "dense"), *((cut, method) for cut in CUTS for method in METHODS)]
    ]


def measure(cell: Real, args: Any) -> Any:
    """The record of one method on one chunk of one task."""
    bench = bench_of(cell.model, cell.task, cell.chunk, args)
    if cell.method == "dense":
        return bench.dense
    return bench.measure(cell.method, pruner_of(cell.model, cell.method, cell.cut, args))


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
