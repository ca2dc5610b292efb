"""From genes to schedules and back: what one search varies, within its budget, its bounds and its kv modes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np

from ftp_lightning.schedule import KV, Schedule, level_step
from ftp_lightning.search.allocations import random_allocation
from ftp_lightning.search.operators import (
    Individual,
    budget_crossover,
    crossover_with_modes,
    level_switch,
    split,
    switch_with_modes,
    to_levels,
    to_schedule,
    top_level,
)
from ftp_lightning.search.settings import SearchSettings

DENSE = "keep"
"""The kv mode that a dense block is given where modes are searched: there it makes no difference."""


class Genome:
    """The settings of a search made concrete for N blocks.

    Genes are N levels and, with `settings.search_kv`, N kv modes (`operators`). Equal schedules have equal genes: a
    dense block always has the mode `DENSE`.

    Args:
        num_blocks: N.
        settings: budget, bounds, step, and whether modes are searched.
        repair: makes of a schedule with modes the one that is measured, see `genetic_search`.
    """

    def __init__(self, num_blocks: int, settings: SearchSettings, repair: Callable[[Schedule], Schedule] | None = None):
        self.num_blocks, self.settings, self.repair = num_blocks, settings, repair
        self.lower, self.upper = settings.bounds(num_blocks)
        free = max(0.0, settings.budget - math.fsum(self.lower) / num_blocks)  # what the lower bounds leave to spread
        self.step = level_step(num_blocks, free, settings.step)
        self.tops = [top_level(self.step, high, low) for low, high in zip(self.lower, self.upper)]
        grid, bounds = range(max(self.tops) + 1), zip(self.lower, self.upper)
        self._sparsities = np.array([[min(round(low + n * self.step, 12), high) for n in grid] for low, high in bounds])

    def schedule(self, genes: Sequence[int]) -> Schedule:
        """What is measured of an individual."""
        return self.measured(self.planned(genes))

    def planned(self, genes: Sequence[int]) -> Schedule:
        """What the genes say: a schedule of the budget."""
        levels, modes = split(genes, self.num_blocks)
        schedule = to_schedule(levels, self.step, self.upper, self.lower)
        return schedule.under([KV[mode] for mode in modes]) if modes else schedule

    def measured(self, schedule: Schedule) -> Schedule:
        """A schedule of the budget as it is measured; the same, where modes are not searched."""
        if not self.settings.search_kv or schedule.kv is None:
            return schedule
        modes = [mode if s > 0 else DENSE for mode, s in zip(schedule.kv, schedule.sparsity)]
        found = schedule.under(modes)
        return self.repair(found) if self.repair else found

    def nearest(self, schedule: Schedule) -> Individual:
        """The individual nearest a schedule of the budget."""
        levels = to_levels(schedule, self.step, self.tops, self.lower)
        return self._canonical([*levels, *map(KV.index, schedule.kv or ())]) if self.settings.search_kv else levels

    def anywhere(self, rng: random.Random) -> Individual:
        """The individual nearest a random schedule; of random modes, where modes are searched."""
        schedule = random_allocation(self.num_blocks, self.settings.budget, rng, self.lower, self.upper)
        if self.settings.search_kv:
            schedule = schedule.under([rng.choice(KV) for _ in range(self.num_blocks)])
        return self.nearest(schedule)

    def mutant(self, genes: Sequence[int], rng: random.Random) -> Individual:
        """A mutated copy of the same budget."""
        if not self.settings.search_kv:
            return level_switch(genes, rng, self.tops, self.settings.switches)
        return self._canonical(switch_with_modes(genes, rng, self.tops, self.settings.switches))

    def child(self, a: Sequence[int], b: Sequence[int], rng: random.Random) -> Individual:
        """A mixture of two individuals, of the same budget."""
        if not self.settings.search_kv:
            return budget_crossover(a, b, rng)
        return self._canonical(crossover_with_modes(a, b, rng))

    def features(self, individuals: Sequence[Sequence[int]]) -> np.ndarray:
        """(n, N) for the surrogate: the sparsities; negative in blocks that evict, where modes are searched."""
        genes = np.asarray(individuals)
        levels, modes = genes[:, : self.num_blocks], genes[:, self.num_blocks :]
        sparsity = self._sparsities[np.arange(self.num_blocks), levels]
        missing = sum(self.lower) + self.step * levels.sum(1) - sparsity.sum(1)
        for place in np.flatnonzero(missing > 1e-11 * self.num_blocks).tolist():  # an upper bound has cut something off
            sparsity[place] = self.planned(individuals[place]).sparsity
        return np.where(modes == KV.index("evict"), -sparsity, sparsity) if self.settings.search_kv else sparsity

    def _canonical(self, genes: Sequence[int]) -> Individual:
        levels, modes = split(genes, self.num_blocks)
        skips = [level > 0 or low > 0 for level, low in zip(levels, self.lower)]
        return Individual([*levels, *(mode if some else KV.index(DENSE) for mode, some in zip(modes, skips))])
