"""How soon does the first token come with the ready-made pruner of SmolLM2, and with other methods, on a CPU?

    python experiments/record_times.py            # goes on from what is published
    python experiments/record_times.py --tables   # the table of docs/record.md, from what is published

Dense and pruned prefills in turn in one process, the router in the clock. The clock is the processor time of one
thread, which other work on the machine hardly changes. Methods are separated by semicolons and named as in record.py.
"""

from __future__ import annotations

import torch

from ftp_lightning.studies.grid import arguments, finished, sentences
from ftp_lightning.studies.record_questions import Sources
from ftp_lightning.studies.record_study import RecordStudy
from ftp_lightning.studies.record_times import RecordTimes, Timed, times_table

SMOL = "smollm2-135m-instruct"
READY = [f"{SMOL} at {budget}" for budget in ("0.133333", "0.233333", "0.333333", "0.433333")]
OTHERS = ["17-29"] + [
    f"{name} to 0.2" for name in ("default", "late_blocks", "fast_kv", "lazy_llm", "gem_filter", "deletion_recent")
]
PACKED = "experiments/found/record_times.jsonl.xz"


def main() -> None:
    about = {"model": SMOL, "tokens": "64,128,256,512,1024,2048", "methods": "; ".join(READY)}
    args = arguments(__doc__, "runs/record_times", PACKED, **about)
    methods = [one.strip() for one in args.methods.split(";") if one.strip()]
    cells = [Timed(args.model, int(length), one) for length in args.tokens.split(",") for one in methods]
    if args.methods == about["methods"]:
        cells += [Timed(args.model, 1024, one) for one in OTHERS]
    torch.set_num_threads(1)
    with sentences():
        print(times_table(finished(cells, RecordTimes(RecordStudy((), Sources("", ""))).measure, args)))


if __name__ == "__main__":
    main()
