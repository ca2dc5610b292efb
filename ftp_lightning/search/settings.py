"""The settings of the schedule search."""

from __future__ import annotations

from dataclasses import dataclass

from ftp_lightning.errors import UserError


@dataclass(frozen=True)
class SearchSettings:
    """How to search. UserError for impossible values.

    Args:
        budget: mean token sparsity B over the blocks, in [0, 1).
        step: requested difference of two levels; the nearest that divides N * B is taken.
        generations: rounds of children.
        offspring: children per generation, scored on `stage_windows` windows.
        survivors: best children of a generation, scored on all windows together with the parents.
        parents: schedules that go on to the next generation.
        switches: most level switches per child.
        crossover: probability that a child mixes two parents before it is mutated.
        stage_windows: windows of the shared minibatch, as many of each kind.
        patience: generations without a better schedule after which to stop; None = never.
        max_sparsity: highest sparsity of a block.
        seed: of all randomness.
    """

    budget: float
    step: float = 0.05
    generations: int = 10
    offspring: int = 12
    survivors: int = 3
    parents: int = 2
    switches: int = 2
    crossover: float = 0.3
    stage_windows: int = 8
    patience: int | None = None
    max_sparsity: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name in ("offspring", "survivors", "parents", "switches", "stage_windows", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}, must be at least 1")
        if self.generations < 0:
            raise UserError(f"generations is {self.generations}, must be at least 0")
        if not 0.0 <= self.crossover <= 1.0:
            raise UserError(f"crossover is {self.crossover}, must be in [0, 1]")
        if not 0.0 <= self.budget <= self.max_sparsity <= 1.0 or self.budget == 1.0:
            raise UserError(f"budget is {self.budget}, must be in [0, 1) and at most max_sparsity, {self.max_sparsity}")
