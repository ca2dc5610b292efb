"""Integer levels and the operators that move them: the sum of the levels, hence the budget, never changes.

An individual is a list of N levels g_l in {0, ..., G}; block l has sparsity g_l * step. Every function here is pure:
it returns a new individual and draws from the `random.Random` it is given.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from deap import base

from ftp_lightning.schedule import Schedule


class Loss(base.Fitness):
    """DEAP fitness of one number, the lower the better."""

    weights = (-1.0,)


class Individual(list):
    """Integer levels, one per block, with the loss DEAP sorts by. No global creator: it pickles and copies anywhere."""

    def __init__(self, levels: Sequence[int] = ()):
        super().__init__(levels)
        self.fitness = Loss()

    @property
    def loss(self) -> float:
        return self.fitness.values[0]


def top_level(step: float, max_sparsity: float = 1.0) -> int:
    """The lowest level G with G * step >= max_sparsity; `to_schedule` cuts off what lies beyond."""
    return math.ceil(max_sparsity / step - 1e-9)


def to_levels(schedule: Schedule, step: float, max_level: int) -> Individual:
    """The levels nearest a schedule whose sum is round(sum(s) / step): largest remainders are rounded up first.

    ValueError where `max_level` in every block is less than that sum.
    """
    exact = [s / step for s in schedule.sparsity]
    total = round(math.fsum(exact))
    if total > max_level * len(exact):
        raise ValueError(f"a level sum of {total} does not fit {len(exact)} blocks of at most {max_level}")
    levels = [min(math.floor(x), max_level) for x in exact]
    while sum(levels) < total:
        open_blocks = [block for block, level in enumerate(levels) if level < max_level]
        levels[max(open_blocks, key=lambda block: exact[block] - levels[block])] += 1
    return Individual(levels)


def to_schedule(levels: Sequence[int], step: float, max_sparsity: float = 1.0) -> Schedule:
    """s_l = min(g_l * step, max_sparsity); what the bound cuts off is carried by the block with the most room.

    The mean is step * sum(g) / N to 1e-9. ValueError where there is not enough room in all blocks together.
    """
    sparsity = [min(round(level * step, 12), max_sparsity) for level in levels]
    missing = step * sum(levels) - math.fsum(sparsity)
    while missing > 1e-10 * len(sparsity):
        carrier = min(range(len(sparsity)), key=lambda block: sparsity[block])
        share = min(missing, max_sparsity - sparsity[carrier])
        if share <= 0.0:
            raise ValueError(f"a mean of {step * sum(levels) / len(levels)} does not fit below {max_sparsity}")
        sparsity[carrier] = min(sparsity[carrier] + share, max_sparsity)
        missing -= share
    return Schedule(sparsity)


def level_switch(levels: Sequence[int], rng: random.Random, max_level: int, switches: int) -> Individual:
    """Mutation of EvoPress (Sieberling et al. 2024): one block down, another up, so the sum stays.

    The number of switches is the smaller of two draws from 1..switches: mostly few [EvoPress]. A switch moves one
    level, with probability 1/2 two, 1/4 four, ..., as far as both blocks allow [ours: a fine step would otherwise
    creep].
    """
    child = Individual(levels)
    for _ in range(min(rng.randint(1, switches), rng.randint(1, switches))):
        givers = [block for block, level in enumerate(child) if level > 0]
        takers = [block for block, level in enumerate(child) if level < max_level]
        pairs = [(giver, taker) for giver in givers for taker in takers if giver != taker]
        if not pairs:
            break
        giver, taker = rng.choice(pairs)
        amount = min(_doubling(rng), child[giver], max_level - child[taker])
        child[giver] -= amount
        child[taker] += amount
    return child


def budget_crossover(a: Sequence[int], b: Sequence[int], rng: random.Random) -> Individual:
    """Uniform crossover, repaired: every level lies between those of the parents and the sum is theirs [ours].

    The repair moves random blocks one level at a time towards the parent that mends the sum; as sum(min) <= sum <=
    sum(max) over the blocks it always ends. Bounds hold because they hold for the parents. ValueError for parents of
    different sums.
    """
    if len(a) != len(b) or sum(a) != sum(b):
        raise ValueError(f"parents differ: {len(a)} and {len(b)} blocks, level sums {sum(a)} and {sum(b)}")
    child = Individual(x if rng.random() < 0.5 else y for x, y in zip(a, b))
    while (excess := sum(child) - sum(a)) != 0:
        direction, limit = (-1, min) if excess > 0 else (1, max)
        movable = [block for block, pair in enumerate(zip(a, b)) if child[block] != limit(pair)]
        child[rng.choice(movable)] += direction
    return child


def _doubling(rng: random.Random) -> int:
    """1 with probability 1/2, 2 with 1/4, 4 with 1/8, ..."""
    amount = 1
    while rng.random() < 0.5:
        amount *= 2
    return amount
