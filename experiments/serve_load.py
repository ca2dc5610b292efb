"""What does a server lose, mix up, hold and cost under load? Every answer is compared with that of `generate` alone.

python experiments/serve_load.py --clients 1,4,16 --seconds 60
"""

import argparse
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import torch

from ftp_lightning import Schedule, StaticRouter, TokenPruner
from ftp_lightning.data.sources import load_documents
from ftp_lightning.evaluation.speed.timing import interleaved, median_interval, seconds
from ftp_lightning.models import load

MODEL, TOKENIZER = load("embedded")
PRUNER = TokenPruner(StaticRouter(), Schedule.default(12, 0.3))
IDS = TOKENIZER.encode(" ".join(load_documents("embedded", "test")), verbose=False)
PROMPTS = [IDS[97 * number :][:length] for number in range(4) for length in (256, 512, 1024, 1900)]


def memory(pid: int) -> float:
    """Megabytes of a process and all that it has started."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    below = [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return pages * os.sysconf("SC_PAGESIZE") / 1e6 + sum(map(memory, below))


def alone(prompt: list[int], mode: str) -> str:
    one = torch.tensor([prompt])
    with PRUNER.changed(schedule=Schedule.default(12, 0.3 if mode == "always" else 0.0))(MODEL):
        said = MODEL.generate(one, attention_mask=torch.ones_like(one), max_new_tokens=8, do_sample=False)
    return TOKENIZER.decode(said[0, len(prompt) :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--seconds", type=float, default=60)
    asked, draw = parser.parse_args(), torch.Generator().manual_seed(0)
    command = [sys.executable, "-m", "ftp_lightning", "serve", "--port", "0", "--budget", "0.3"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    url = next(server.stdout or iter([])).split()[1]

    def ask(prompt: list[int], mode: str) -> dict:
        body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ftp_mode": mode}
        return httpx.post(f"{url}/v1/completions", json=body, timeout=900).raise_for_status().json()

    def client(seed: int) -> list[tuple[int, dict, dict]]:  # raises where an answer is lost
        choose, found, end = random.Random(seed), [], time.monotonic() + asked.seconds
        while time.monotonic() < end:
            prompt = choose.randrange(len(PROMPTS))
            found.append((prompt, ask(PROMPTS[prompt], "off"), ask(PROMPTS[prompt], "always")))
        return found

    right = [[alone(prompt, mode) for mode in ("off", "always")] for prompt in PROMPTS]
    for clients in map(int, asked.clients.split(",")):
        with ThreadPoolExecutor(clients) as pool:
            found = [pair for own in pool.map(client, range(clients)) for pair in own]
        same = [[one["choices"][0]["text"] for one in both] == right[prompt] for prompt, *both in found]
        limit = sum(1 / (1 - pruned["ftp"]["flops_saved"]) for *_, pruned in found) / len(found)
        print(f"{clients} clients: {sum(same)} of {len(found)} pairs as alone; then {memory(server.pid):.0f} MB")
        for name in ("time_to_first_token_ms", "prefill_ms"):
            ratio = torch.tensor([dense["ftp"][name] / pruned["ftp"][name] for _, dense, pruned in found])
            print(f"  dense / pruned {name}: {median_interval(ratio, draw)}, FLOPs limit {limit:.3f}", flush=True)
    one, other = (lambda how=how: seconds(lambda: how(PROMPTS[2], "off"), MODEL.device) for how in (ask, alone))
    times = interleaved(one, other, 15, warmup=2)
    print(f"served / bare, 1,024 tokens: {median_interval(times[:, 0] / times[:, 1], draw)}")
    server.terminate()


if __name__ == "__main__":
    main()
