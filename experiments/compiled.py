"""Does torch.compile work with a pruner attached, and is it worth it?

    python experiments/compiled.py --kv evict

Stock, compiled stock, pruned and compiled pruned prefills in turn in one process; and whether compiling moved a logit.
"""

import argparse
import contextlib
import time

import torch

from ftp_lightning import DynamicRouter, Schedule, TokenPruner
from ftp_lightning.models import load_model


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="random:llama-110m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kv", default="evict", choices=("evict", "keep"))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--budget", type=float, default=0.4)
    parser.add_argument("--rounds", type=int, default=8)
    asked = parser.parse_args()

    model = load_model(asked.model, dtype=asked.dtype)
    torch.manual_seed(0)
    schedule = Schedule.uniform(model.config.num_hidden_layers, asked.budget)
    pruner = TokenPruner(DynamicRouter(), schedule, kv=asked.kv)
    ids = torch.randint(model.config.vocab_size, (1, asked.length))
    compiled = {"stock": torch.compile(model), "pruned": torch.compile(model)}
    runs: dict[tuple[str, str], list[float]] = {(who, how): [] for who in compiled for how in ("eager", "compiled")}
    logits = {}
    for turn in range(asked.rounds + 2):  # the first two compile
        for who, how in runs:
            with pruner(model) if who == "pruned" else contextlib.nullcontext():
                start = time.perf_counter()
                run = model if how == "eager" else compiled[who]
                logits[who, how] = run(input_ids=ids, use_cache=True, logits_to_keep=1).logits
                if turn > 1:
                    runs[who, how].append(time.perf_counter() - start)
    base = torch.tensor(runs["stock", "eager"])
    for who, how in runs:
        ratio = (base / torch.tensor(runs[who, how])).median()
        moved = (logits[who, how] - logits[who, "eager"]).abs().max() / logits[who, "eager"].abs().max()
        print(f"{who:7s} {how:9s} {ratio:.2f}x stock, largest relative change of a logit {moved:.1e}")


if __name__ == "__main__":
    main()
