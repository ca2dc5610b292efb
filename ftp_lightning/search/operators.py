"""Integer levels and the operators that move them: the sum of the levels, hence the budget, never changes.

An individual is a list of N levels g_l in {0, ..., G_l}; block l has sparsity lower_l + g_l * step, at most upper_l.
Where kv modes are searched too, N modes follow, as places in `schedule.KV`: block l then has the mode KV[m_l].
Every function here is pure: it returns a new individual and draws from the `random.Random` it is given. Bounds are one
number for all blocks, or one per block.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from deap import base

from ftp_lightning.schedule import Schedule

PerBlock = float | Sequence[float] | np.ndarray
"""One number for all blocks, or one per block."""


class Loss(base.Fitness):
    """DEAP fitness of one number, the lower the better."""

    weights = (-1.0,)


class Individual(list[int]):
    """Integer levels, one per block, with the loss DEAP sorts by. No global creator: it pickles and copies anywhere.
    reach: by which of its ways a surrogate proposed it, if it did."""

    def __init__(self, levels: Sequence[int] = (), loss: float | None = None, reach: int | None = None):
        super().__init__(levels)
        self.reach = reach
        self.fitness = Loss() if loss is None else Loss((loss,))

    @property
    def loss(self) -> float:
        return self.fitness.values[0]


def per_block(values: PerBlock, num_blocks: int) -> tuple:
    """One value per block. ValueError where there are neither one nor `num_blocks` of them."""
    listed = tuple(values) if isinstance(values, (list, tuple, Sequence)) else (values,)  # the abstract check is slow
    if len(listed) not in (1, num_blocks):
        raise ValueError(f"{len(listed)} values were given for {num_blocks} blocks")
    return listed * num_blocks if len(listed) == 1 else listed


def top_level(step: float, max_sparsity: float = 1.0, min_sparsity: float = 0.0) -> int:
    """The lowest level G with min + G * step >= max; `to_schedule` cuts off what lies beyond."""
    return math.ceil((max_sparsity - min_sparsity) / step - 1e-9)


def to_levels(schedule: Schedule, step: float, max_level: PerBlock, lower: PerBlock = 0.0) -> Individual:
    """The levels nearest a schedule whose sum is round(sum(s - lower) / step), the largest remainders rounded up first.

    ValueError where `max_level` in every block is less than that sum.
    """
    blocks = schedule.num_blocks
    tops = per_block(max_level, blocks)
    exact = [max(0.0, s - low) / step for s, low in zip(schedule.sparsity, per_block(lower, blocks))]
    total = round(math.fsum(exact))
    if total > sum(tops):
        raise ValueError(f"a level sum of {total} does not fit {blocks} blocks of at most {max_level}")
    levels = [min(math.floor(x), top) for x, top in zip(exact, tops)]
    while sum(levels) < total:
        open_blocks = [block for block, level in enumerate(levels) if level < tops[block]]
        levels[max(open_blocks, key=lambda block: exact[block] - levels[block])] += 1
    return Individual(levels)


def to_schedule(
    levels: Sequence[int], step: float, max_sparsity: PerBlock = 1.0, min_sparsity: PerBlock = 0.0
) -> Schedule:
    """s_l = min(lower_l + g_l * step, upper_l); what the bound cuts off is carried by the block with the most room.

    The sum is sum(lower) + step * sum(g) to 1e-9 a block. ValueError where there is not enough room in all blocks
    together.
    """
    lower, upper = per_block(min_sparsity, len(levels)), per_block(max_sparsity, len(levels))
    sparsity = [min(round(low + level * step, 12), high) for level, low, high in zip(levels, lower, upper)]
    missing = math.fsum(lower) + step * sum(levels) - math.fsum(sparsity)
    while missing > 1e-10 * len(sparsity):
        carrier = max(range(len(sparsity)), key=lambda block: upper[block] - sparsity[block])
        share = min(missing, upper[carrier] - sparsity[carrier])
        if share <= 0.0:
            mean = (math.fsum(lower) + step * sum(levels)) / len(levels)
            raise ValueError(f"a mean of {mean} does not fit below {max_sparsity}")
        sparsity[carrier] = min(sparsity[carrier] + share, upper[carrier])
        missing -= share
    return Schedule(sparsity)


def level_switch(levels: Sequence[int], rng: random.Random, max_level: PerBlock, switches: int) -> Individual:
    """Mutation of EvoPress (Sieberling et al. 2024): one block down, another up, so the sum stays.

    The number of switches is the smaller of two draws from 1..switches: mostly few [EvoPress]. A switch moves one
    level, with probability 1/2 two, 1/4 four, ..., as far as both blocks allow [ours: a fine step would otherwise
    creep].
    """
    child, tops = Individual(levels), per_block(max_level, len(levels))
    for _ in range(min(rng.randint(1, switches), rng.randint(1, switches))):
        givers = [block for block, level in enumerate(child) if level > 0]
        takers = [block for block, (level, top) in enumerate(zip(child, tops)) if level < top]
        pairs = len(givers) * len(takers) - len(set(givers).intersection(takers))
        if not pairs:
            break
        giver, taker = _pair(givers, takers, rng.randrange(pairs))
        amount = min(_doubling(rng), child[giver], tops[taker] - child[taker])
        child[giver] -= amount
        child[taker] += amount
    return child


def _pair(givers: list[int], takers: list[int], number: int) -> tuple[int, int]:
    """Entry `number` of `[(giver, taker) for giver in givers for taker in takers if giver != taker]`."""
    for giver in givers:
        others = len(takers) - (giver in takers)
        if number < others:
            skipped = giver in takers and takers.index(giver) <= number
            return giver, takers[number + skipped]
        number -= others
    raise IndexError("there are fewer pairs")


def budget_crossover(a: Sequence[int], b: Sequence[int], rng: random.Random) -> Individual:
    """Uniform crossover, repaired: every level lies between those of the parents and the sum is theirs [ours].

    The repair moves random blocks one level at a time towards the parent that mends the sum; as sum(min) <= sum <=
    sum(max) over the blocks it always ends. Bounds hold because they hold for the parents. ValueError for parents of
    different sums.
    """
    if len(a) != len(b) or sum(a) != sum(b):
        raise ValueError(f"parents differ: {len(a)} and {len(b)} blocks, level sums {sum(a)} and {sum(b)}")
    child = Individual([x if rng.random() < 0.5 else y for x, y in zip(a, b)])
    while (excess := sum(child) - sum(a)) != 0:
        direction, limit = (-1, min) if excess > 0 else (1, max)
        movable = [block for block, pair in enumerate(zip(a, b)) if child[block] != limit(pair)]
        child[rng.choice(movable)] += direction
    return child


def split(genes: Sequence[int], num_blocks: int) -> tuple[list[int], list[int]]:
    """The levels and the modes of an individual; no modes where they are not searched."""
    return list(genes[:num_blocks]), list(genes[num_blocks:])


def mode_flip(modes: Sequence[int], rng: random.Random, flips: int) -> list[int]:
    """Change the kv mode of some blocks: as many as the smaller of two draws from 1..flips [ours, as `level_switch`].

    At least one mode changes, and at most `flips`.
    """
    count = min(rng.randint(1, flips), rng.randint(1, flips), len(modes))
    changed = set(rng.sample(range(len(modes)), count))
    return [1 - mode if block in changed else mode for block, mode in enumerate(modes)]


def switch_with_modes(genes: Sequence[int], rng: random.Random, max_level: PerBlock, switches: int) -> Individual:
    """Mutation of levels and modes: a level switch, a mode flip or both, one as likely as another [ours].

    The sum of the levels stays. A block that leaves level 0 draws its mode, as the one before had no effect.
    """
    num_blocks = len(genes) // 2
    levels, modes = split(genes, num_blocks)
    kind = rng.randrange(3)
    child = Individual(levels) if kind == 0 else level_switch(levels, rng, max_level, switches)
    if kind != 1:
        modes = mode_flip(modes, rng, switches)
    risen = [before == 0 and after > 0 for before, after in zip(levels, child)]
    return Individual([*child, *(rng.randrange(2) if rose else mode for rose, mode in zip(risen, modes))])


def crossover_with_modes(a: Sequence[int], b: Sequence[int], rng: random.Random) -> Individual:
    """`budget_crossover` of the levels; a block takes the mode of the parent whose level is nearer its own.

    Where both are as near, a draw decides. The sum of the levels is the parents'; every mode is one of theirs.
    """
    num_blocks = len(a) // 2
    (levels_a, modes_a), (levels_b, modes_b) = split(a, num_blocks), split(b, num_blocks)
    child = budget_crossover(levels_a, levels_b, rng)
    apart = [abs(level - x) - abs(level - y) for level, x, y in zip(child, levels_a, levels_b)]
    first = [distance < 0 or (distance == 0 and rng.random() < 0.5) for distance in apart]
    return Individual([*child, *(x if takes else y for takes, x, y in zip(first, modes_a, modes_b))])


def _doubling(rng: random.Random) -> int:
    """1 with probability 1/2, 2 with 1/4, 4 with 1/8, ..."""
    amount = 1
    while rng.random() < 0.5:
        amount *= 2
    return amount


def tournament(population: Sequence[Individual], rng: random.Random, size: int) -> Individual:
    """The best of `size` random individuals. DEAP's own draws from the global generator, which resuming cannot mend."""
    return min((rng.choice(population) for _ in range(size)), key=lambda individual: individual.loss)
