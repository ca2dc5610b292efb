"""How much faster do two processes search than one, and what memory does a search take?

    python experiments/search_speed.py --generations 2

One search of the embedded model, in one process of one thread and in two of one thread each, in turn: measured
candidates per second after the first population, as a ratio of medians, and whether both found the same schedule. Then
the memory above the loaded model's, at the peak of a search on 65,536 calibration tokens. Compare only what one run
gives: machines differ and are shared.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from ftp_lightning import Schedule, StaticRouter, TokenPruner
from ftp_lightning.data.sources import load_documents
from ftp_lightning.data.windows import calibration_windows
from ftp_lightning.models import load
from ftp_lightning.processes import launch
from ftp_lightning.search.fitness import ContinuationFitness
from ftp_lightning.search.genetic import genetic_search
from ftp_lightning.search.settings import SearchSettings

GIB = 1 << 30


def search(processes: Any, device: torch.device, count: int, generations: int) -> tuple[float, Sequence[float], float]:
    """Candidates per second after the first population, what was found, and GiB above the model's at the peak."""
    torch.set_num_threads(1)
    model, tokenizer = load("embedded")
    documents = load_documents("embedded", "calibration")
    windows = calibration_windows(tokenizer, documents, 192, 64, count, seed=0)
    loaded, blocks = peak_memory(), model.config.num_hidden_layers
    fitness = ContinuationFitness(model, windows, lambda schedule: TokenPruner(StaticRouter(), schedule, kv="keep"), 8)
    marks: list[tuple[int, float]] = []
    settings = SearchSettings(budget=0.3, generations=generations)

    def mark(state: dict[str, Any]) -> None:
        marks.append((fitness.evaluations, time.perf_counter()))

    seeds = {"uniform": Schedule.uniform(blocks, 0.3)}
    found = genetic_search(fitness, blocks, settings, seeds, mark, processes=processes)
    (first, started), (last, ended) = marks[0], marks[-1]
    rate = (last - first) / (ended - started) if generations else 0.0
    return rate, found.schedule.sparsity, (peak_memory() - loaded) / GIB


def peak_memory() -> int:
    """Bytes of this process, at its peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--generations", type=int, default=4)
    args = parser.parse_args()
    rates: dict[int, list[float]] = {1: [], 2: []}
    schedules = set()
    for _ in range(args.repeats):
        for count in rates:
            rate, schedule, _ = launch(count, torch.device("cpu"), search, 32, args.generations)
            rates[count].append(rate)
            schedules.add(tuple(schedule))
    one, two = (statistics.median(found) for found in rates.values())
    print(f"two processes / one: {two / one:.2f}x candidates per second (medians of {args.repeats}, in turn)")
    print("the same schedule each time" if len(schedules) == 1 else f"DIFFERENT schedules: {schedules}")
    _, _, memory = launch(1, torch.device("cpu"), search, 256, 1)
    print(f"memory above the loaded model's, 256 windows of 256 tokens: {memory:.2f} GiB")


if __name__ == "__main__":
    main()
