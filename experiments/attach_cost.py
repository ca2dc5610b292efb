"""What it costs to attach a pruner and to detach it again, in calls and against a forward.

    python experiments/attach_cost.py --model smollm2-135m-instruct

Processor time of one thread, attachments and forwards in turn; `calls` are calls of Python functions.
"""

import argparse
import sys
import tempfile
import time
from functools import partial

import torch

from ftp_lightning import Schedule, StaticRouter, TokenPruner
from ftp_lightning.evaluation.speed.timing import interleaved, median_interval, seconds
from ftp_lightning.models import load_model

TIMES = 20
"""Attachments that are timed together."""


def attach(pruner, model, times: int = 1) -> None:
    for _ in range(times):
        with pruner(model):
            pass


def calls(run, *arguments) -> int:
    """Calls of Python functions that `run` makes."""
    found = 0

    def count(frame, event, argument) -> None:
        nonlocal found
        found += event == "call"

    sys.setprofile(count)
    try:
        run(*arguments)
    finally:
        sys.setprofile(None)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=21)
    asked = parser.parse_args()
    torch.set_num_threads(1)

    model = load_model(asked.model)
    made = TokenPruner(StaticRouter(), Schedule.default(model.config.num_hidden_layers, 0.3))
    with tempfile.TemporaryDirectory() as folder:
        made.save(folder, model=model)
        loaded = TokenPruner.load(folder)
    ids = torch.randint(model.config.vocab_size, (1, asked.tokens), generator=torch.Generator().manual_seed(0))

    def timed(run):
        return lambda: seconds(run, torch.device("cpu"), time.process_time)

    for name, pruner in {"made here": made, "loaded": loaded}.items():
        first, later = (calls(attach, pruner, model) for _ in range(2))
        many = timed(partial(attach, pruner, model, TIMES))
        times = interleaved(timed(lambda: model(input_ids=ids)), many, asked.pairs, warmup=1)
        share = median_interval(100 * times[:, 1] / times[:, 0] / TIMES, torch.Generator().manual_seed(0))
        told = f"{share.value:.2f} % [{share.low:.2f}, {share.high:.2f}] of a forward of {asked.tokens} tokens"
        print(f"{name}: {told}, {later} calls; the first time {first}")


if __name__ == "__main__":
    main()
