"""A Gaussian process of the loss over schedules, fitted to all that a search has measured: it proposes children.

Measuring a schedule costs a forward over calibration windows; asking the process costs milliseconds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

MOST_POINTS = 300
"""The surrogate is fitted to so many measured schedules, the best: its cost grows with their cube."""
DENSE_APART = 0.3
"""How much farther apart two sparsities count where one is 0: a dense block looks at every token."""
EVICT_APART = 1.0
"""Weight of what evicting blocks skip, in the distance of two schedules of different kv modes [ours]."""
GRID = {
    "alone": (0.2, 0.5, 1.0, 2.0),
    "joint": (0.7, 1.4, 2.8, 5.6),
    "share": (0.2, 0.5, 0.8),
    "noise": (1e-3, 5e-3, 0.02, 0.08),
}


@dataclass(frozen=True)
class Kernel:
    """k(x, x') = share * mean_l m(d_l / alone) + (1 - share) * m(sqrt(sum_l d_l^2) / joint), in [0, 1].

    m is Matern's with nu = 5/2; d_l = |x_l - x'_l|, plus `DENSE_APART` where one of the two blocks is dense. So a block
    has an effect of its own, whatever the others do, and one that depends on them [ours].

    Where kv modes are searched, x_l is negative in a block that evicts, and d_l is the Euclidean distance of the points
    (|x_l|, `EVICT_APART` * what evicting blocks skip): two modes differ the more, the more tokens skip.

    Args:
        alone, joint: lengths over which the two parts vary.
        share: of the first part.
        noise: variance of one measurement as a share of the process': which tokens are kept moves in steps.
    """

    alone: float = 0.5
    joint: float = 2.8
    share: float = 0.5
    noise: float = 5e-3

    def __call__(self, apart: np.ndarray) -> np.ndarray:
        """apart (..., N), distances by block -> (...)."""
        whole = np.sqrt(np.square(apart).sum(-1))
        return self.share * _matern(apart / self.alone).mean(-1) + (1 - self.share) * _matern(whole / self.joint)


class Process:
    """A Gaussian process of one score, given the covariance of the points measured, at the likeliest scale.

    Args:
        covariance: (n, n), of the process without noise, 1 on the diagonal.
        scores: (n,).
        noise: variance of one measurement, as a share of the process'.
    """

    def __init__(self, covariance: np.ndarray, scores: np.ndarray, noise: float):
        self.mean = scores.mean()
        self._factor = np.linalg.cholesky(covariance + noise * np.eye(len(scores)))
        self._whitened = self._whiten(scores[:, None] - self.mean)
        self.scale = math.sqrt(max(float(np.square(self._whitened).mean()), 1e-12))
        self.likelihood = -len(scores) * math.log(self.scale) - float(np.log(np.diag(self._factor)).sum())

    def __call__(self, near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of the score at m points; near (m, n): their covariance with those measured."""
        whitened = self._whiten(near.T)
        left = 1.0 - np.square(whitened).sum(0)
        return self.mean + whitened.T @ self._whitened[:, 0], self.scale * np.sqrt(np.maximum(left, 1e-12))

    def _whiten(self, columns: np.ndarray) -> np.ndarray:
        factor, columns = torch.from_numpy(self._factor), torch.from_numpy(np.ascontiguousarray(columns))
        return torch.linalg.solve_triangular(factor, columns, upper=False).numpy()


class Surrogate:
    """The loss on all windows as the mean over its chunks, the log loss of each a process of its own: what one text
    loses another may keep, and a schedule measured on one chunk says something of that chunk alone.

    Args:
        sparsity: (n, N), schedules that were measured; negative in blocks that evict, where kv modes are searched.
        logs: (n, chunks), log losses, NaN where not measured; every chunk was measured at least once.
        sizes: windows in each chunk.
        kernel: of all processes; None = the likeliest of `GRID`, one argument after another.
    """

    def __init__(self, sparsity: np.ndarray, logs: np.ndarray, sizes: Sequence[int], kernel: Kernel | None = None):
        standing = np.nanmean(logs - np.nanmean(logs, axis=0), axis=1)
        best = np.sort(np.argsort(standing, kind="stable")[:MOST_POINTS])
        self.sparsity, self.logs, self.sizes = sparsity[best], logs[best], np.asarray(sizes, dtype=float)
        self._rows = [np.flatnonzero(~np.isnan(column)) for column in self.logs.T]
        self._apart = _distances(self.sparsity, self.sparsity)
        self.kernel = kernel or self._likeliest()
        self.processes = self._processes(self.kernel)

    @classmethod
    def fitted(cls, sparsity: np.ndarray, measured: Sequence[Mapping[int, float]], sizes: Sequence[int]) -> Surrogate:
        """To {chunk: loss} of each of n schedules (n, N). A loss of 0 counts as a millionth of the chunk's mean."""
        losses = np.full((len(measured), len(sizes)), np.nan)
        for row, known in enumerate(measured):
            losses[row, list(known)] = list(known.values())
        return cls(sparsity, np.log(np.maximum(losses, 1e-6 * np.nanmean(losses, axis=0) + 1e-12)), sizes)

    def __call__(self, sparsity: np.ndarray, deviations: float = 0.0) -> np.ndarray:
        """Loss (m,) expected of schedules (m, N), so many deviations below the mean in every chunk."""
        means, spread = self._expected(sparsity)
        return np.exp(means - deviations * spread) @ self.sizes / self.sizes.sum()

    def believing(self, sparsity: np.ndarray) -> Surrogate:
        """As if schedules (m, N) had been measured and were as expected: they are not proposed again."""
        logs = np.vstack([self.logs, self._expected(sparsity)[0]])
        return Surrogate(np.vstack([self.sparsity, sparsity]), logs, self.sizes, self.kernel)

    def _expected(self, sparsity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation (m, chunks) of the log losses of schedules (m, N)."""
        near = self.kernel(_distances(sparsity, self.sparsity))
        found = [process(near[:, rows]) for process, rows in zip(self.processes, self._rows)]
        return np.stack([mean for mean, _ in found], 1), np.stack([deviation for _, deviation in found], 1)

    def _likeliest(self) -> Kernel:
        @functools.cache
        def likelihood(kernel: Kernel) -> float:
            return sum(process.likelihood for process in self._processes(kernel, most=4))

        kernel = Kernel()
        for name in (*GRID, *GRID):
            kernel = max((replace(kernel, **{name: value}) for value in GRID[name]), key=likelihood)
        return kernel

    def _processes(self, kernel: Kernel, most: int | None = None) -> list[Process]:
        """One for each chunk, or for the first `most`."""
        covariance = kernel(self._apart)
        return [
            Process(covariance[np.ix_(rows, rows)], self.logs[rows, chunk], kernel.noise)
            for chunk, rows in enumerate(self._rows[:most])
        ]


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, N), (m, N) -> (n, m, N)."""
    a, b = a[:, None], b[None]
    evicted = EVICT_APART * (np.minimum(a, 0.0) - np.minimum(b, 0.0))
    return np.hypot(np.abs(a) - np.abs(b), evicted) + DENSE_APART * ((a != 0) != (b != 0))


def _matern(distance: np.ndarray) -> np.ndarray:
    """Matern's kernel with nu = 5/2 at distances in lengths."""
    scaled = math.sqrt(5) * distance
    return (1 + scaled + scaled * scaled / 3) * np.exp(-scaled)
