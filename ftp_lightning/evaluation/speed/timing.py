"""The stopwatch: things timed in turn, and what their pairs say."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ftp_lightning.evaluation.statistics import Interval


def interleaved(first: Callable[[], float], second: Callable[[], float], pairs: int, warmup: int = 0) -> Tensor:
    """(pairs, 2) float64: what the two returned, called in turn; see `in_turn`."""
    return in_turn((first, second), pairs, warmup)


def in_turn(runs: Sequence[Callable[[], float]], rounds: int, warmup: int = 0) -> Tensor:
    """(rounds, runs) float64: what all returned, each called once in a round [ours].

    Who goes first changes from round to round, so that a slow drift of the clock rate falls on all; of two, neither
    profits from the other's warm caches. The first `warmup` rounds are thrown away.
    """
    times = []
    for number in range(warmup + rounds):
        order = [(number + place) % len(runs) for place in range(len(runs))]
        found = {place: runs[place]() for place in order}
        times.append([found[place] for place in range(len(runs))])
    return torch.tensor(times[warmup:], dtype=torch.float64)


Clock = Callable[[], float]
"""What is read before and after, in seconds: `time.perf_counter`, or, for one thread on a CPU that others use too,
`time.process_time` (what the process itself was given)."""


def seconds(run: Callable[[], Any], device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Seconds of one call, kernels on the device included; what it returns is freed after the clock is read."""
    wait(device)
    start = clock()
    result = run()
    wait(device)
    passed = clock() - start
    del result
    return passed


def wait(device: torch.device) -> None:
    """Kernels on an accelerator run behind the clock's back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_interval(values: Tensor, generator: torch.Generator, samples: int = 2000) -> Interval:
    """The median of `values` (n,) and its 95 % percentile bootstrap interval; no ends beyond the value of a single
    pair."""
    import numpy as np
    from scipy.stats import bootstrap

    median = float(np.median(values.numpy()))
    n = len(values)
    if n < 2:
        return Interval(median, median, median, n, n)
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    found = bootstrap((values.numpy(),), np.median, n_resamples=samples, method="percentile", rng=rng)
    low, high = found.confidence_interval
    return Interval(median, float(low), float(high), n, n)
