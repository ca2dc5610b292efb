"""How much of what the FLOPs allow does a pruned prefill reach, at short prompts and with small blocks?

    python experiments/prefill_limits.py --tokens 256,1024
    python experiments/prefill_limits.py --tables     # the table of docs/benchmarks.md, from what is published

Dense and pruned prefills in turn in one process, router in the clock, at equal FLOPs cuts: the static router under
`evict`, and two stages (the first blocks dense, of the last ones 80 % skipped, keys and values kept).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from pandas import DataFrame

from ftp_lightning import StaticRouter, TokenPruner
from ftp_lightning.costs.budget import solve_budget, stages_with_cut
from ftp_lightning.evaluation.speed.block_clock import BlockClock
from ftp_lightning.evaluation.speed.cell import Bench
from ftp_lightning.evaluation.speed.prompts import random_prompts
from ftp_lightning.models import load
from ftp_lightning.studies.grid import Cell, arguments, finished, sentences

PACKED = "experiments/found/prefill_limits.jsonl.xz"


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


def measure(cell: Prefill) -> DataFrame:
    model, generator = loaded(cell.model, cell.dtype), torch.Generator().manual_seed(0)
    evict = cell.shape == "evict"
    asked = model, cell.cut, cell.tokens
    schedule = solve_budget(*asked, "evict").under("evict") if evict else stages_with_cut(*asked)
    prompts = random_prompts(model, cell.tokens, 1, generator=generator)
    bench = Bench(model, 15, 0, generator)
    return DataFrame([bench.cell(TokenPruner(StaticRouter(), schedule), prompts, BlockClock(model, prompts))])


def table(found: DataFrame) -> str:
    found["speed-up [95 %]"] = [f"{r.speedup:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in found.itertuples()]
    found["of shape limit"] = found["speedup"] / found["shape_limit"]
    shown = ["model", "dtype", "tokens", "shape", "cut", "speed-up [95 %]", "flops_limit", "limit_share", "shape_limit"]
    return found[[*shown, "of shape limit"]].round(2).to_markdown(index=False)


def main() -> None:
    grid = {"models": "smollm2-135m-instruct,gemma3-270m,random:llama-110m", "dtypes": "float32,bfloat16"}
    grid |= {"tokens": "256,512,1024,2048,4096", "cuts": "0.2,0.4,0.6"}
    args = arguments(__doc__, "runs/prefill_limits", PACKED, **grid)
    models, dtypes, tokens, cuts = (getattr(args, name).split(",") for name in grid)
    cells = [
        Prefill(model, dtype, int(length), shape, float(cut))
        for length, model, dtype, cut, shape in product(tokens, models, dtypes, cuts, ("evict", "stages"))
    ]
    torch.set_num_threads(1)
    with sentences():
        print(table(finished(cells, measure, args)))


if __name__ == "__main__":
    main()
