"""All that changes during a search, and its JSON-able record, from which the search goes on unchanged."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, field
from typing import Any

from ftp_lightning.schedule import Schedule
from ftp_lightning.search.operators import Individual


@dataclass
class SearchState:
    """All that changes during a search; `record` makes it JSON-able, `restore` reads that.

    seconds: how long the generations took, interruptions not counted; no product holds it. tokens_before: forward
    tokens of the fitness before this search. tried: genes of all that was measured, in that order. wins: by the
    reach of a proposal, how many generations it gave a better schedule.
    """

    rng: random.Random
    best: Schedule
    best_value: float
    allocations: dict[str, float]
    parents: list[Individual]
    generation: int = 0
    stale: int = 0
    seconds: float = 0.0
    tokens_before: int = 0
    tried: list[tuple[int, ...]] = field(default_factory=list)
    wins: list[int] = field(default_factory=list)
    entries: list[dict] = field(default_factory=list)

    def record(self) -> dict:
        version, numbers, gauss = self.rng.getstate()
        return {
            "generation": self.generation,
            "stale": self.stale,
            "seconds": self.seconds,
            "tokens_before": self.tokens_before,
            "rng": [version, list(numbers), gauss],
            "best": self.best.record() | {"value": self.best_value},
            "allocations": dict(self.allocations),
            "parents": [{"levels": list(p), "value": p.loss} for p in self.parents],
            "tried": [list(levels) for levels in self.tried],
            "wins": list(self.wins),
            "log": [dict(entry) for entry in self.entries],
        }

    @staticmethod
    def restore(record: dict) -> SearchState:
        rng = random.Random()
        version, numbers, gauss = record["rng"]
        rng.setstate((version, tuple(numbers), gauss))
        parents = [Individual(p["levels"], p["value"]) for p in record["parents"]]
        best = record["best"]
        rest: dict[str, Any] = {name: record[name] for name in ("generation", "stale", "seconds", "tokens_before")}
        found = {"best": Schedule.from_record(best), "best_value": best["value"]}
        tried = [tuple(levels) for levels in record["tried"]]
        lists: dict[str, Any] = {"tried": tried, "wins": list(record["wins"]), "entries": list(record["log"])}
        return SearchState(rng=rng, allocations=dict(record["allocations"]), parents=parents, **found, **rest, **lists)


def population_hash(population: list[Individual]) -> str:
    """16 hex digits over genes and losses, to the last bit: processes that drift apart show it."""
    text = json.dumps([[list(individual), individual.loss] for individual in population])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
