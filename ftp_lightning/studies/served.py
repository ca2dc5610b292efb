"""A server on a free port, for the `serve_` experiments: its address, answers and memory; and `generate` without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import torch

from ftp_lightning.pruning import TokenPruner


class Server:
    """`ftp-lightning serve` with these flags, for as long as the context lasts."""

    def __init__(self, *flags: str):
        command = [sys.executable, "-m", "ftp_lightning", "serve", "--port", "0", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.url = next(self.process.stdout or iter([])).split()[1]
        self.client = httpx.Client(base_url=self.url, timeout=900, limits=httpx.Limits(max_connections=None))

    def ask(self, prompt: str | list[int], **fields: Any) -> dict[str, Any]:
        """A whole answer. Raises where there is none."""
        body = {"prompt": prompt, "temperature": 0} | fields
        return self.client.post("/v1/completions", json=body).raise_for_status().json()

    def streamed(self, prompt: str | list[int], **fields: Any) -> str:
        """The text of a streamed answer. Raises where it does not end with [DONE]."""
        body = {"prompt": prompt, "temperature": 0, "stream": True} | fields
        *events, end = (line[6:] for line in self.client.post("/v1/completions", json=body).text.split("\n\n") if line)
        assert end == "[DONE]", end
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    def memory(self) -> float:
        """Megabytes of the server and of all processes that it has started."""
        return sum(_pages(pid) for pid in _processes(self.process.pid)) * os.sysconf("SC_PAGESIZE") / 1e6

    def processor(self) -> float:
        """Seconds of processor time that the server and all its processes have used."""
        return sum(_ticks(pid) for pid in _processes(self.process.pid)) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: Any) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait(30)


def generated(model: Any, tokenizer: Any, pruner: TokenPruner | None, ids: list[int], new_tokens: int) -> str:
    """What bare `generate` answers to these tokens, greedily; pruner: attached meanwhile, None: dense."""
    prompt = torch.tensor([ids])
    with nullcontext() if pruner is None else pruner(model):
        said = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False
        )
    return tokenizer.decode(said[0, len(ids) :], skip_special_tokens=True)


def _processes(pid: int) -> list[int]:
    """A process and all that it has started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    below = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [pid, *(one for child in below for one in _processes(child))]


def _pages(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def _ticks(pid: int) -> int:
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11:13]))
