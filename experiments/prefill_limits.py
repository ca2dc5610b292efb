"""How much of what the FLOPs allow does a pruned prefill reach, at short prompts and with small blocks?

    python experiments/prefill_limits.py --tokens 256,1024
    python experiments/prefill_limits.py --shapes default --tokens 8,16,32,64,128 --cuts 0.1,0.3
    python experiments/prefill_limits.py --tables     # the table of docs/benchmarks.md, from what is published

Dense and pruned prefills in turn in one process, router in the clock, at equal FLOPs cuts: the static router under
`evict`, and two stages (the first blocks dense, of the last ones 80 % skipped, keys and values kept). Cells of one
model, precision and length share the dense prefill of a round. `default` is what `--budget` gives, its cut placed at
1,024 tokens, with `least_tokens="auto"`: is it ever slower than dense? The clock is the processor time of one thread,
which other work on the machine hardly changes.
"""

from __future__ import annotations

from itertools import product

import torch
from pandas import DataFrame

from ftp_lightning.studies.grid import arguments, finished, sentences
from ftp_lightning.studies.prefill import Prefill, Prefills

PACKED = "experiments/found/prefill_limits.jsonl.xz"


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
    cells = tuple(
        Prefill(model, dtype, int(length), shape, float(cut))
        for length, model, dtype, cut, shape in product(tokens, models, dtypes, cuts, shapes)
    )
    torch.set_num_threads(1)
    with sentences():
        print(table(finished(cells, Prefills(cells, args.output).measure, args)))


if __name__ == "__main__":
    main()
