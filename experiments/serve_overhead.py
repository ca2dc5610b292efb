"""What does a server add to tokenizer and bare `generate`? Pairs in turn, whole and streamed, dense and pruned.

OMP_NUM_THREADS=1 python experiments/serve_overhead.py --pruned smollm2-135m-instruct --pairs 15
"""

import argparse
import time
from functools import partial

import torch

from ftp_lightning import load_pruned
from ftp_lightning.data.sources import load_documents
from ftp_lightning.data.text import prompt_ids
from ftp_lightning.evaluation.speed.timing import interleaved, median_interval, seconds
from ftp_lightning.studies.served import Server, generated


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pruned", default="embedded", help="a ready-made pruner; its base model is served")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--new_tokens", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=15)
    asked, draw = parser.parse_args(), torch.Generator().manual_seed(0)
    model, tokenizer = load_pruned(asked.pruned)
    pruner = model.pruner.changed(least_tokens=0)
    model.pruner.detach()
    text = " ".join(load_documents("embedded", "test"))
    prompt = tokenizer.decode(tokenizer.encode(text, verbose=False)[1 : asked.tokens + 1], skip_special_tokens=True)

    spent: list[float] = []

    def bare(mode: str) -> None:
        begin = time.process_time()
        attached = pruner if mode == "always" else None
        generated(model, tokenizer, attached, prompt_ids(tokenizer, prompt), asked.new_tokens)
        spent.append(time.process_time() - begin)

    with Server("--pruned", asked.pruned) as server:
        for mode in ("off", "always"):
            for name, ask in (("whole", server.ask), ("streamed", server.streamed)):
                served = partial(ask, prompt, max_tokens=asked.new_tokens, ftp_mode=mode)
                first, second = (partial(seconds, how, model.device) for how in (served, partial(bare, mode)))
                before = server.processor()
                spent.clear()
                times = interleaved(first, second, asked.pairs, warmup=2)
                used = (server.processor() - before) / sum(spent)
                ratio, more = times[:, 0] / times[:, 1], 1e3 * (times[:, 0] - times[:, 1])
                print(
                    f"{len(prompt_ids(tokenizer, prompt))} tokens, {mode}, {name}: served / bare "
                    f"{median_interval(ratio, draw):.3f}, {median_interval(more, draw):.0f} ms more "
                    f"than {1e3 * times[:, 1].median():.0f} ms; of processor time {used:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
