"""The genetic search over schedules of one budget: DEAP's toolbox, a (mu + lambda) loop of our own.

The paper's scheduler searches with a genetic algorithm (Section 4.2). From EvoPress (Sieberling et al. 2024): level
switches that keep the budget, one shared minibatch per stage, multi-step selection. Ours: seeds from closed-form
allocations, a memo, resume.
"""

from __future__ import annotations

import functools
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from ftp_lightning.errors import UserError
from ftp_lightning.schedule import Schedule, level_step
from ftp_lightning.search.fitness import MemoFitness
from ftp_lightning.search.operators import Individual, budget_crossover, level_switch, to_levels, to_schedule, top_level
from ftp_lightning.search.settings import SearchSettings
from ftp_lightning.search.state import SearchState, population_hash

log = logging.getLogger(__name__)
ATTEMPTS = 20  # draws per child until it is one not seen in this generation


@dataclass(frozen=True)
class SearchResult:
    """The best schedule, its loss on all windows, the log per generation, and the loss of every seed allocation."""

    schedule: Schedule
    value: float
    generations: list[dict]
    allocations: dict[str, float]


class _Search:
    """One search: the settings made concrete for N blocks, and DEAP's toolbox over them."""

    def __init__(self, fitness: MemoFitness, num_blocks: int, settings: SearchSettings, map_function: Callable):
        from deap import base, tools

        self.fitness, self.settings = fitness, settings
        self.step = level_step(num_blocks, settings.budget, settings.step)
        self.top = top_level(self.step, settings.max_sparsity)
        self.toolbox = base.Toolbox()
        self.toolbox.register("evaluate", self.evaluate)
        self.toolbox.register("mate", budget_crossover)
        self.toolbox.register("mutate", level_switch, max_level=self.top, switches=settings.switches)
        self.toolbox.register("select", tools.selBest)
        self.toolbox.register("map", map_function)

    def evaluate(self, individual: Individual, indices: tuple[int, ...] | None = None) -> float:
        return self.fitness(self.schedule(individual), indices)

    def schedule(self, individual: Individual) -> Schedule:
        return to_schedule(individual, self.step, self.settings.max_sparsity)

    def score(self, individuals: list[Individual], indices: tuple[int, ...] | None = None) -> None:
        """Put the loss on the windows `indices` (default: all) into every individual; `map` may be many processes."""
        values = self.toolbox.map(functools.partial(self.toolbox.evaluate, indices=indices), individuals)
        for individual, value in zip(individuals, values):
            individual.fitness.values = (value,)

    def begin(self, seeds: dict[str, Schedule]) -> SearchState:
        """Score the seed allocations as they are, then rounded to levels as the first population."""
        schedules = list(seeds.values())
        allocations = dict(zip(seeds, self.toolbox.map(self.fitness, schedules)))
        best = min(seeds, key=allocations.get)
        population = _distinct([to_levels(schedule, self.step, self.top) for schedule in schedules])
        self.score(population)
        state = SearchState(random.Random(self.settings.seed), seeds[best], allocations[best], allocations, [])
        self._conclude(state, population, children=0)
        state.stale = 0  # no generation has been tried yet
        return state

    def advance(self, state: SearchState) -> None:
        """One generation: children on a minibatch, the survivors with the parents on all windows, the best go on."""
        settings = self.settings
        state.generation += 1
        children = self.children(state.parents, state.rng)
        self.score(children, stage_indices(self.fitness.kinds, settings.stage_windows, state.rng))
        survivors = self.toolbox.select(children, settings.survivors)
        self.score(survivors)
        self._conclude(state, _distinct(state.parents + survivors), len(children))

    def children(self, parents: list[Individual], rng: random.Random) -> list[Individual]:
        """`offspring` mutants, mixed first with probability `crossover`; all new, fewer where no new one is drawn."""
        seen, children = {tuple(parent) for parent in parents}, []
        for _ in range(self.settings.offspring):
            for _ in range(ATTEMPTS):
                child = self.toolbox.mutate(self._origin(parents, rng), rng)
                if tuple(child) not in seen:
                    seen.add(tuple(child))
                    children.append(child)
                    break
        return children

    def _origin(self, parents: list[Individual], rng: random.Random) -> Individual:
        if len(parents) > 1 and rng.random() < self.settings.crossover:
            return self.toolbox.mate(*rng.sample(parents, 2), rng)
        return rng.choice(parents)

    def _conclude(self, state: SearchState, population: list[Individual], children: int) -> None:
        """Select the next parents from a population scored on all windows, remember the best, write the log entry."""
        state.parents = self.toolbox.select(population, self.settings.parents)
        champion = state.parents[0]
        state.stale += 1
        if champion.loss < state.best_value:
            state.best, state.best_value, state.stale = self.schedule(champion), champion.loss, 0
        state.entries.append(
            {
                "generation": state.generation,
                "best": state.best_value,
                "mean": sum(individual.loss for individual in population) / len(population),
                "children": children,
                "evaluations": self.fitness.evaluations,
                "memo_hits": self.fitness.memo_hits,
                "forward_tokens": self.fitness.forward_tokens,
                "population_hash": population_hash(state.parents),
            }
        )


def genetic_search(
    fitness: MemoFitness,
    num_blocks: int,
    settings: SearchSettings,
    seeds: dict[str, Schedule],
    on_generation: Callable[[dict], None] | None = None,
    resume: dict | None = None,
    map_function: Callable = map,
) -> SearchResult:
    """Search the schedule of least loss on all windows among those whose mean is the budget.

    The result is never worse than the best seed. Each log entry holds: `best` so far and `mean` over the candidates,
    both on all windows; children; evaluations, memo_hits and forward_tokens since the beginning; population_hash,
    equal on all ranks. No times.

    Args:
        seeds: allocations by name, each of `num_blocks` blocks and the settings' budget.
        on_generation: receives the JSON-able state after the seeds (generation 0) and after every generation.
        resume: such a state; the search goes on from it to the result it would have had, `seeds` being the same.
        map_function: like `map`; the seam for many processes.

    UserError for seeds of another shape or budget, and for a state of another search.
    """
    _check_seeds(seeds, num_blocks, settings)
    identity = {"settings": asdict(settings), "seeds": {name: seed.key() for name, seed in seeds.items()}}
    search = _Search(fitness, num_blocks, settings, map_function)
    if resume is None:
        state = search.begin(seeds)
        _report(state, search, identity, on_generation)
    else:
        state = _resumed(resume, identity, fitness)
    while state.generation < settings.generations and (settings.patience is None or state.stale < settings.patience):
        started = time.monotonic()
        search.advance(state)
        _report(state, search, identity, on_generation, time.monotonic() - started)
    return SearchResult(state.best, state.best_value, state.entries, state.allocations)


def stage_indices(kinds: Sequence[str], count: int, rng: random.Random) -> tuple[int, ...]:
    """`count` random windows (all where there are fewer), ascending, of each kind equally many as far as they go."""
    queues = [[i for i, kind in enumerate(kinds) if kind == name] for name in sorted(set(kinds))]
    for queue in queues:
        rng.shuffle(queue)
    rng.shuffle(queues)  # which kind has one more where `count` does not divide
    chosen = []
    while len(chosen) < min(count, len(kinds)):
        queue = queues.pop(0)
        if queue:
            chosen.append(queue.pop())
            queues.append(queue)
    return tuple(sorted(chosen))


def _distinct(population: list[Individual]) -> list[Individual]:
    """Without repetitions; equal levels have equal losses."""
    return list({tuple(individual): individual for individual in population}.values())


def _check_seeds(seeds: dict[str, Schedule], num_blocks: int, settings: SearchSettings) -> None:
    if not seeds:
        raise UserError("a search needs at least one seed allocation")
    for name, seed in seeds.items():
        if seed.num_blocks != num_blocks or abs(seed.budget - settings.budget) > 1e-9:
            raise UserError(
                f"seed {name} has {seed.num_blocks} blocks and budget {seed.budget}, "
                f"the search {num_blocks} blocks and budget {settings.budget}"
            )
        if max(seed.sparsity) > settings.max_sparsity:
            raise UserError(
                f"seed {name} has a block of sparsity {max(seed.sparsity)}, max_sparsity is {settings.max_sparsity}"
            )


def _report(state: SearchState, search: _Search, identity: dict, on_generation, seconds: float | None = None) -> None:
    entry, took = state.entries[-1], "" if seconds is None else f", {seconds:.1f} s"
    log.info("generation %d: best %.6f, mean %.6f%s", entry["generation"], entry["best"], entry["mean"], took)
    if on_generation is not None:
        on_generation({**identity, **state.record(), "fitness": search.fitness.state_dict()})


def _resumed(record: dict, identity: dict, fitness: MemoFitness) -> SearchState:
    for name, value in identity.items():
        if record[name] != value:
            raise UserError(
                f"the search to resume had other {name}: {record[name]}\nnow: {value}\nStart anew, or use the same."
            )
    fitness.load_state_dict(record["fitness"])
    return SearchState.restore(record)
