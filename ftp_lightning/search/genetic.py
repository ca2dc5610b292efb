"""The genetic search over schedules of one budget: DEAP's toolbox, a (mu + lambda) loop of our own.

The paper's scheduler searches with a genetic algorithm (Section 4.2). From EvoPress (Sieberling et al. 2024): level
switches that keep the budget, one shared minibatch per stage, multi-step selection. Ours: seeds from closed-form
allocations, a memo, a surrogate that proposes children, resume, processes, stop rules.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from ftp_lightning.errors import UserError
from ftp_lightning.processes import Processes
from ftp_lightning.schedule import Schedule
from ftp_lightning.search.fitness import MemoFitness
from ftp_lightning.search.genome import Genome
from ftp_lightning.search.operators import Individual, tournament
from ftp_lightning.search.settings import SearchSettings
from ftp_lightning.search.state import SearchState, population_hash
from ftp_lightning.search.surrogate import Surrogate

log = logging.getLogger(__name__)
ATTEMPTS = 20  # draws per child until it is one not seen in this generation
DRAWS, ELITE = 80, 8  # a proposal: mutants drawn in each of its rounds, how many of them go on
REACH = ((2, 0.0, False), (4, 0.3, False), (8, 1.0, False), (16, 1.0, True))
"""Of a proposal: its rounds, the deviations by which what is uncertain counts as better, and whether it begins at
random schedules in place of the best. Which suits depends on the model, the budget and the kv mode; the last leaves a
place that is better than all around it."""


@dataclass(frozen=True)
class SearchResult:
    """The best schedule, its loss on all windows, the log per generation, and the loss of every seed allocation.

    `stopped`: which rule ended the search: generations, patience, max_forward_tokens or max_seconds.
    """

    schedule: Schedule
    value: float
    generations: list[dict]
    allocations: dict[str, float]
    stopped: str = "generations"


class _Search:
    """One search: a genome, and DEAP's toolbox over it."""

    def __init__(self, fitness: MemoFitness, genome: Genome, processes: Processes):
        from deap import base, tools

        self.fitness, self.genome, self.processes = fitness, genome, processes
        self.settings = settings = genome.settings
        self.toolbox = base.Toolbox()
        self.toolbox.register("mate", genome.child)
        self.toolbox.register("mutate", genome.mutant)
        self.toolbox.register("pick", tournament, size=settings.tournament)
        self.toolbox.register("select", tools.selBest)
        self.toolbox.register("map", processes.map)

    def losses(self, schedules: Sequence[Schedule], chunks: Sequence[int] | None = None) -> list[float]:
        return self.fitness.scores(schedules, chunks, self.toolbox.map)

    def score(self, individuals: list[Individual], chunks: Sequence[int] | None = None) -> None:
        """Put the loss on the windows of `chunks` (default: all) into every individual."""
        for individual, value in zip(
            individuals, self.losses([self.genome.schedule(one) for one in individuals], chunks)
        ):
            individual.fitness.values = (value,)

    def begin(self, seeds: dict[str, Schedule]) -> SearchState:
        """Score the seed allocations as they are, then rounded to levels as the first population."""
        schedules, before = (
            {name: self.genome.measured(seed) for name, seed in seeds.items()},
            self.fitness.forward_tokens,
        )
        allocations = dict(zip(seeds, self.losses(list(schedules.values()))))
        best = min(seeds, key=allocations.__getitem__)
        population = _distinct([self.genome.nearest(seed) for seed in seeds.values()])
        known = dict(
            zip(schedules.values(), allocations.values())
        )  # a seed on the grid of levels is not measured again
        for individual in population:
            individual.fitness.values = (known.get(self.genome.schedule(individual), math.nan),)
        self.score([individual for individual in population if math.isnan(individual.loss)])
        state = SearchState(random.Random(self.settings.seed), schedules[best], allocations[best], allocations, [])
        state.tokens_before = before
        state.tried = [tuple(individual) for individual in population]
        state.wins = [0] * len(REACH)
        self._conclude(state, population, children=0)
        state.stale = 0  # no generation has been tried yet
        return state

    def advance(self, state: SearchState) -> None:
        """One generation: children on few windows, fewer of them on more, the last with the parents on all."""
        settings, sizes = self.settings, self.fitness.sizes
        state.generation += 1
        children = self.children(state)
        state.tried = list(dict.fromkeys([*state.tried, *map(tuple, children)]))
        survivors, order = children, state.rng.sample(range(len(sizes)), len(sizes))
        for windows, count in settings.stages(sum(sizes)):
            self.score(survivors, enough_chunks(sizes, order, windows))
            survivors = self.toolbox.select(survivors, count)
        self.score(survivors)
        self._conclude(state, _distinct(state.parents + survivors), len(children))

    def stopped_by(self, state: SearchState) -> str | None:
        """The stop rule that holds now; the clock is that of the first process."""
        settings = self.settings
        if state.generation >= settings.generations:
            return "generations"
        if settings.patience is not None and state.stale >= settings.patience:
            return "patience"
        spent = self.fitness.forward_tokens - state.tokens_before
        if settings.max_forward_tokens is not None and spent >= settings.max_forward_tokens:
            return "max_forward_tokens"
        if settings.max_seconds is not None and self.processes.from_first(state.seconds) >= settings.max_seconds:
            return "max_seconds"
        return None

    def children(self, state: SearchState) -> list[Individual]:
        """`offspring` children, none a parent, no two alike; fewer where no new one is drawn. The surrogate proposes
        its share, where it can; the others are mutants, mixed first with probability `crossover`."""
        settings, seen = self.settings, {tuple(parent) for parent in state.parents}
        children = self.proposals(state, round(settings.proposed * settings.offspring))
        seen |= {tuple(child) for child in children}
        for _ in range(settings.offspring - len(children)):
            for _ in range(ATTEMPTS):
                child = self._mutant(state.parents, state.rng)
                if tuple(child) not in seen:
                    seen.add(tuple(child))
                    children.append(child)
                    break
        return children

    def proposals(self, state: SearchState, count: int) -> list[Individual]:
        """Up to `count` schedules never tried, for which the surrogate expects most, each as if the ones before were
        measured. How far from the best each may lie is drawn, by how often that led to a better schedule so far."""
        if count == 0:
            return []
        measured = [self.fitness.known(self.genome.schedule(genes)) for genes in state.tried]
        features = self.genome.features(state.tried)
        surrogate = Surrogate.fitted(features, measured, self.fitness.sizes)
        best = _ranked(dict(zip(state.tried, surrogate(features).tolist())))
        chosen, seen = [], set(state.tried)
        for reach in state.rng.choices(range(len(REACH)), [(1 + wins) ** 2 for wins in state.wins], k=count):
            rounds, deviations, anywhere = REACH[reach]
            pool = self._random(surrogate, state.rng) if anywhere else best
            proposal = self._proposal(surrogate, pool, seen, state.rng, rounds, deviations)
            if proposal is None:
                break
            chosen.append((list(proposal), reach))
            seen.add(tuple(proposal))
            surrogate = surrogate.believing(self.genome.features([proposal]))
        return [Individual(levels, reach=reach) for levels, reach in self.processes.from_first(chosen)]

    def _proposal(
        self,
        surrogate: Surrogate,
        best: list[Individual],
        seen: set,
        rng: random.Random,
        rounds: int,
        deviations: float,
    ) -> Individual | None:
        """The mutant of mutants of the best, none of those seen, of least expected loss; None where none is drawn."""
        pool = best
        expected: dict[tuple[int, ...], float] = {}
        for _ in range(rounds):
            mutants = dict.fromkeys(tuple(self._mutant(pool, rng)) for _ in range(DRAWS))
            drawn = [levels for levels in mutants if levels not in seen and levels not in expected]
            if drawn:
                expected |= dict(zip(drawn, surrogate(self.genome.features(drawn), deviations).tolist()))
                pool = _ranked(expected)
        return pool[0] if expected else None

    def _random(self, surrogate: Surrogate, rng: random.Random) -> list[Individual]:
        """`ELITE` random schedules, each with what is expected of it as its loss."""
        drawn = [self.genome.anywhere(rng) for _ in range(ELITE)]
        return _ranked(dict(zip(map(tuple, drawn), surrogate(self.genome.features(drawn)).tolist())))

    def _mutant(self, parents: list[Individual], rng: random.Random) -> Individual:
        return self.toolbox.mutate(self._origin(parents, rng), rng)

    def _origin(self, parents: list[Individual], rng: random.Random) -> Individual:
        if len(parents) > 1 and rng.random() < self.settings.crossover:
            if self.settings.tournament == 1:
                return self.toolbox.mate(*rng.sample(parents, 2), rng)
            return self.toolbox.mate(self.toolbox.pick(parents, rng), self.toolbox.pick(parents, rng), rng)
        return self.toolbox.pick(parents, rng)

    def _conclude(self, state: SearchState, population: list[Individual], children: int) -> None:
        """Select the next parents from a population scored on all windows, remember the best, write the log entry."""
        state.parents = self.toolbox.select(population, self.settings.parents)
        champion = state.parents[0]
        state.stale += 1
        if champion.loss < state.best_value:
            if champion.reach is not None:
                state.wins[champion.reach] += 1
            state.best, state.best_value, state.stale = self.genome.schedule(champion), champion.loss, 0
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
    processes: Processes | None = None,
    repair: Callable[[Schedule], Schedule] | None = None,
) -> SearchResult:
    """Search the schedule of least loss on all windows among those whose mean is the budget.

    The result is never worse than the best seed. Each log entry holds: `best` so far and `mean` over the candidates,
    both on all windows; children; evaluations, memo_hits and forward_tokens since the beginning; population_hash,
    which is compared over all processes. No times.

    Args:
        seeds: allocations by name, each of `num_blocks` blocks and the settings' budget.
        on_generation: receives the JSON-able state after the seeds (generation 0) and after every generation.
        resume: such a state; the search goes on from it to the result it would have had, `seeds` being the same.
        processes: those that share the measurements; every one of them calls this function with equal arguments.
        repair: with `settings.search_kv`: turns a schedule of the budget, with its modes, into the one that is measured
            and found, as `flops_budget.FlopsCut` does. Its `repr` tells it apart.

    UserError for proposals without a memo, seeds of another shape or budget, a state of another search, a stage of
    more windows than there are, and processes that differ.
    """
    processes = processes or Processes()
    _check_seeds(seeds, num_blocks, settings)
    if settings.proposed and not fitness.remembers:
        raise UserError("children are proposed from what was measured, which nothing remembers\nGive proposed = 0.")
    _check_stages(settings, fitness)
    seed_keys = {name: seed.key() for name, seed in seeds.items()}
    identity = {"settings": asdict(settings), "seeds": seed_keys, "fitness": fitness.identity(), "repair": repr(repair)}
    identity = json.loads(json.dumps(identity))
    processes.check_equal("what is searched", identity)
    search, started = _Search(fitness, Genome(num_blocks, settings, repair), processes), time.monotonic()
    if resume is None:
        state = search.begin(seeds)
        _report(state, search, identity, on_generation, started)
    else:
        state = _resumed(resume, identity, fitness)
        log.info("going on after generation %d", state.generation)
    while (stopped := search.stopped_by(state)) is None:
        started = time.monotonic()
        search.advance(state)
        _report(state, search, identity, on_generation, started)
    return SearchResult(state.best, state.best_value, state.entries, state.allocations, stopped)


def enough_chunks(sizes: Sequence[int], order: Sequence[int], windows: int) -> list[int]:
    """The first chunks of `order` that together hold at least `windows` windows (all where they do not), ascending."""
    chosen: list[int] = []
    for chunk in order:
        if sum(sizes[other] for other in chosen) >= windows:
            break
        chosen.append(chunk)
    return sorted(chosen)


def _ranked(expected: dict[tuple[int, ...], float]) -> list[Individual]:
    """The `ELITE` best, each with what is expected of it as its loss."""
    return [Individual(levels, expected[levels]) for levels in sorted(expected, key=expected.__getitem__)[:ELITE]]


def _distinct(population: list[Individual]) -> list[Individual]:
    """Without repetitions; equal levels have equal losses."""
    return list({tuple(individual): individual for individual in population}.values())


def _check_seeds(seeds: dict[str, Schedule], num_blocks: int, settings: SearchSettings) -> None:
    if not seeds:
        raise UserError("a search needs at least one seed allocation")
    lower, upper = settings.bounds(num_blocks)
    for name, seed in seeds.items():
        if seed.num_blocks != num_blocks or abs(seed.budget - settings.budget) > 1e-9:
            raise UserError(
                f"seed {name} has {seed.num_blocks} blocks and budget {seed.budget}, "
                f"the search {num_blocks} blocks and budget {settings.budget}"
            )
        if settings.search_kv and seed.kv is None:
            raise UserError(f"seed {name} says no kv mode, and modes are searched\nGive it one: seed.under(kv).")
        for block, (s, low, high) in enumerate(zip(seed.sparsity, lower, upper)):
            if not low - 1e-9 <= s <= high + 1e-9:
                raise UserError(f"seed {name} has sparsity {s} in block {block}, which is to have {low} to {high}")


def _check_stages(settings: SearchSettings, fitness: MemoFitness) -> None:
    """A stage that asks for more windows than there are would be no stage."""
    windows, asked = sum(fitness.sizes), max(settings.stage_windows, default=0)
    if asked > windows:
        raise UserError(
            f"a stage asks for {asked} calibration windows, there are {windows}\n"
            "Give more --windows or fewer --stage_windows."
        )


def _report(state: SearchState, search: _Search, identity: dict, on_generation, started: float) -> None:
    entry, took = state.entries[-1], time.monotonic() - started
    state.seconds += took
    search.processes.check_equal(f"the population of generation {state.generation}", entry["population_hash"])
    log.info(
        "generation %d: best %.6f, mean %.6f, %d forward tokens, %.1f s",
        entry["generation"], entry["best"], entry["mean"], entry["forward_tokens"], took,
    )  # fmt: skip
    if on_generation is not None:
        on_generation({**identity, **state.record(), "memo": search.fitness.state_dict()})


def _resumed(record: dict, identity: dict, fitness: MemoFitness) -> SearchState:
    for name, value in identity.items():
        if record.get(name) != value:
            raise UserError(
                f"the search to resume had other {name}: {record.get(name)}\nnow: {value}\nStart anew, or use the same."
            )
    fitness.load_state_dict(record["memo"])
    return SearchState.restore(record)
