"""What does a server lose, mix up, hold and cost under load? Every answer is compared with that of `generate` alone.

In each round all clients ask at once, each a prompt of its own, for dense answers and then for pruned ones; a round's
ratio is that of the times added up.

python experiments/serve_load.py --clients 1,4,16 --seconds 100
"""

import argparse
import random
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from ftp_lightning import load_pruned
from ftp_lightning.data.sources import load_documents
from ftp_lightning.evaluation.speed.timing import median_interval
from ftp_lightning.studies.served import Server, generated


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pruned", default="embedded", help="a ready-made pruner; its base model is served")
    parser.add_argument("--budget", type=float, default=None, help="of the pruner's family; by default its own")
    parser.add_argument("--tokens", default="256,512,1024,1900", help="lengths of prompts")
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--seconds", type=float, default=100, help="of each number of clients, at least")
    parser.add_argument("--rounds", type=int, default=8, help="of each number of clients, at least")
    asked, draw = parser.parse_args(), torch.Generator().manual_seed(0)
    model, tokenizer = load_pruned(asked.pruned)
    pruner = model.pruner if asked.budget is None else model.pruner.at(asked.budget)
    pruner, _ = pruner.changed(least_tokens=0), model.pruner.detach()
    ids = tokenizer.encode(" ".join(load_documents("embedded", "test")), verbose=False)
    lengths = list(map(int, asked.tokens.split(",")))
    prompts = [ids[97 * number :][:length] for number in range(4) for length in lengths]

    def one_round(server: Server, pool: ThreadPoolExecutor, numbers: list[int]) -> list[list[dict]]:
        """All clients ask at once, for dense answers and then for pruned ones; raises where an answer is lost."""
        more = {} if asked.budget is None else {"ftp_budget": asked.budget}
        modes: list[dict] = [{"ftp_mode": "off"}, {"ftp_mode": "always", **more}]
        return [
            list(pool.map(lambda number, how=how: server.ask(prompts[number], max_tokens=8, **how), numbers))
            for how in modes
        ]

    right = [[generated(model, tokenizer, one, prompt, 8) for one in (None, pruner)] for prompt in prompts]
    with Server("--pruned", asked.pruned) as server:
        for clients in map(int, asked.clients.split(",")):
            choose, end = random.Random(clients), time.monotonic() + asked.seconds
            rounds: list[tuple[list[int], list[list[dict]]]] = []
            with ThreadPoolExecutor(clients) as pool:
                while time.monotonic() < end or len(rounds) < asked.rounds:
                    numbers = [choose.randrange(len(prompts)) for _ in range(clients)]
                    rounds.append((numbers, one_round(server, pool, numbers)))
            found = [pair for numbers, both in rounds for pair in zip(numbers, *both)]
            same = [[one["choices"][0]["text"] for one in both] == right[prompt] for prompt, *both in found]
            limit = sum(1 / (1 - pruned["ftp"]["flops_saved"]) for *_, pruned in found) / len(found)
            time.sleep(6)  # until the worker has given freed memory back
            print(f"{clients} clients: {sum(same)} of {len(found)} pairs as alone; then {server.memory():.0f} MB")
            for name in ("time_to_first_token_ms", "prefill_ms"):
                spent = [[sum(one["ftp"][name] for one in answers) for answers in both] for _, both in rounds]
                ratio = torch.tensor([dense / pruned for dense, pruned in spent])
                print(
                    f"  dense / pruned {name}: {median_interval(ratio, draw):.3f}, FLOPs limit {limit:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
