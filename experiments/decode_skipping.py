"""What does a skipped block save when tokens are generated one by one? Decoding reads bytes, and bytes are time.

    python experiments/decode_skipping.py --dtype float32 --kv evict

Every generated token skips 30 % of the blocks (drawn at random, replayed by a FixedRouter); stock and pruned steps in
turn in one process, on caches of their own. The limit is the ratio of the bytes read (`flops.decode_bytes`).
"""

import argparse
from contextlib import nullcontext
from typing import Any

import torch

from ftp_lightning import FixedRouter, TokenPruner
from ftp_lightning.costs.flops import block_costs, decode_bytes
from ftp_lightning.evaluation.speed.timing import median_interval, seconds
from ftp_lightning.models import load_model

WARMUP = 4


def keep_lists(blocks: int, prompt: int, steps: int, share: float) -> list[torch.Tensor]:
    """A dense prompt, then `share` of the blocks skipped by every token."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.ones(blocks, prompt + steps, dtype=torch.bool)
    for step in range(steps):
        keep[torch.randperm(blocks, generator=generator)[: round(share * blocks)], prompt + step] = False
    return [row[None] for row in keep]


def step_seconds(model: Any, token: torch.Tensor, cache: Any) -> float:
    return seconds(lambda: model(token, past_key_values=cache, use_cache=True), model.device)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="random:llama-110m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kv", default="evict", choices=("evict", "keep"))
    parser.add_argument("--prompt_tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--share", type=float, default=0.3)
    asked = parser.parse_args()

    model = load_model(asked.model, dtype=asked.dtype, device=asked.device)
    # every timed step follows one that is not, in the same attachment, as in a text that is generated
    blocks, total = model.config.num_hidden_layers, 2 * (asked.steps + WARMUP)
    keep = keep_lists(blocks, asked.prompt_tokens, total, asked.share)
    pruner = TokenPruner(FixedRouter(keep), None, kv=asked.kv, decode="threshold")
    ids = torch.randint(model.config.vocab_size, (1, asked.prompt_tokens), device=model.device)
    token = ids[:, :1]
    stock = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    with pruner(model):
        pruned = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    ratios, limits, costs = [], [], block_costs(model)
    for step in range(1, total, 2):
        held = [layer.get_seq_length() for layer in stock.layers]
        stored = [layer.keys.shape[2] for layer in pruned.layers]
        skipped = [not bool(row[0, asked.prompt_tokens + step]) for row in keep]
        read = decode_bytes(model, costs, stored, skipped=skipped, kv=asked.kv)
        limits.append(decode_bytes(model, costs, held) / read)
        times = {}
        for name in ("stock", "pruned") if step % 4 == 1 else ("pruned", "stock"):
            within, cache = (nullcontext(), stock) if name == "stock" else (pruner(model), pruned)
            with within:
                step_seconds(model, token, cache)
                times[name] = step_seconds(model, token, cache)
        ratios.append(times["stock"] / times["pruned"])
    found = median_interval(torch.tensor(ratios[WARMUP:], dtype=torch.float64), torch.Generator().manual_seed(0))
    limit = sum(limits[WARMUP:]) / asked.steps
    about = f"{asked.model} {asked.dtype} {asked.kv}, {asked.share:.0%} of the blocks skipped"
    saved = f"{found.value:.2f}x [{found.low:.2f}, {found.high:.2f}], bytes allow {limit:.2f}x"
    print(f"{about} at {asked.prompt_tokens} tokens: {saved}: {found.value / limit:.2f} of it")


if __name__ == "__main__":
    main()
