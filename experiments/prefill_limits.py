"""How much of what the FLOPs allow does a pruned prefill reach, at short prompts and with small blocks?

    python experiments/prefill_limits.py --tokens 256,1024
    python experiments/prefill_limits.py --shapes default --tokens 8,16,32,64,128 --cuts 0.1,0.3
    python experiments/prefill_limits.py --tables     # the table of docs/benchmarks.md, from what is published

Dense and pruned prefills in turn in one process, router in the clock, at equal FLOPs cuts: the static router under
`evict`, and two stages (the first blocks dense, of the last ones 80 % skipped, keys and values kept). `default` is what
`--budget` gives, its cut placed at 1,024 tokens, with `least_tokens="auto"`: is it ever slower than dense? The clock
is the processor time of one thread, which other work on the machine hardly changes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from pandas import DataFrame

from ftp_lightning import StaticRouter, TokenPruner
from ftp_lightning.costs.budget import default_with_cut, solve_budget, stages_with_cut
from ftp_lightning.costs.flops import realised_speedup_limit
from ftp_lightning.evaluation.speed.block_clock import BlockClock
from ftp_lightning.evaluation.speed.limits import shape_limit
from ftp_lightning.evaluation.speed.prefill import prefill_speed
from ftp_lightning.evaluation.speed.prompts import random_prompts
from ftp_lightning.models import load
from ftp_lightning.studies.grid import Cell, arguments, finished, sentences

PACKED = "experiments/found/prefill_limits.jsonl.xz"
PAIRS, MOST = 15, 201
"""Pairs of prefills from 256 tokens on, and at most: shorter prompts are cheaper, and their times differ more."""


@dataclass(frozen=True)
class Prefill(Cell):
    model: str
    dtype: str
    tokens: int
    shape: str
    cut: float


@lru_cache(maxsize=1)
def loaded(model: str, dtype: str) -> Any:
    return load(model, dtype=dtype)[0].eval()


def placed(cell: Prefill, model: Any) -> TokenPruner:
    """The pruner of a cell's shape and cut."""
    if cell.shape == "default":
        return TokenPruner(StaticRouter(), default_with_cut(model, cell.cut, 1024, None), least_tokens="auto")
    if cell.shape == "stages":
        return TokenPruner(StaticRouter(), stages_with_cut(model, cell.cut, cell.tokens))
    return TokenPruner(StaticRouter(), solve_budget(model, cell.cut, cell.tokens, "evict").under("evict"))


def measure(cell: Prefill) -> DataFrame:
    model, generator = loaded(cell.model, cell.dtype), torch.Generator().manual_seed(0)
    prompts = random_prompts(model, cell.tokens, 1, generator=generator)
    pruner, pairs = placed(cell, model), max(PAIRS, min(MOST, PAIRS * 256 // cell.tokens))
    found = prefill_speed(model, pruner, prompts, pairs, generator=generator, clock=time.process_time)
    trace = pruner.trace.routed
    limit = realised_speedup_limit(model, trace, pruner.kv, rank=pruner.skip_rank, last_only=trace.last_only)
    shape = shape_limit(BlockClock(model, prompts, clock=time.process_time), found.dense_ms, trace, pruner.kv)
    ratio = found.ratio
    row = {"speedup": ratio.value, "low": ratio.low, "high": ratio.high, "flops_limit": limit, "shape_limit": shape}
    return DataFrame([row | {"dense_ms": found.dense_ms, "pruned_ms": found.pruned_ms, "pairs": found.pairs}])


def table(found: DataFrame) -> str:
    found["speed-up [95 %]"] = [f"{r.speedup:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in found.itertuples()]
    found["of FLOPs limit"] = found["speedup"] / found["flops_limit"]
    found["of shape limit"] = found["speedup"] / found["shape_limit"]
    shown = ["model", "dtype", "tokens", "shape", "cut", "speed-up [95 %]", "of FLOPs limit", "of shape limit"]
    return found[shown].round(2).to_markdown(index=False)


def main() -> None:
    grid = {"models": "smollm2-135m-instruct,gemma3-270m,random:llama-110m", "dtypes": "float32,bfloat16"}
    grid |= {"tokens": "256,512,1024,2048,4096", "cuts": "0.2,0.4,0.6", "shapes": "evict,stages"}
    args = arguments(__doc__, "runs/prefill_limits", PACKED, **grid)
    models, dtypes, tokens, cuts, shapes = (getattr(args, name).split(",") for name in grid)
    cells = [
        Prefill(model, dtype, int(length), shape, float(cut))
        for length, model, dtype, cut, shape in product(tokens, models, dtypes, cuts, shapes)
    ]
    torch.set_num_threads(1)
    with sentences():
        print(table(finished(cells, measure, args)))


if __name__ == "__main__":
    main()
