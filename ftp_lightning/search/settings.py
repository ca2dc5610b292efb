"""The settings of the schedule search."""

from __future__ import annotations

from dataclasses import dataclass

from ftp_lightning.errors import UserError
from ftp_lightning.search.operators import per_block


@dataclass(frozen=True)
class SearchSettings:
    """How to search. UserError for impossible values.

    Args:
        budget: mean token sparsity B over the blocks, in [0, 1).
        step: requested difference of two levels; the nearest that divides what the lower bounds leave is taken.
        generations: rounds of children.
        offspring: children per generation.
        stage_windows: windows that the children of one generation are measured on, stage by stage, rising; () = a
            quarter and half of all. A stage is rounded up to whole chunks of windows (`fitness`).
        survivors: how many of a stage's children go on to the next, falling; those of the last are measured on all
            windows, beside the parents. () = half of the children, a quarter, ...
        parents: schedules that go on to the next generation.
        tournament: a child's parent is the best of so many random ones (1: any).
        switches: most level switches per child.
        crossover: probability that a child mixes two parents before it is mutated.
        proposed: share of the children that a model of the loss proposes, fitted to all that was measured
            (`surrogate`); the others are drawn by mutation alone.
        patience: generations without a better schedule after which to stop; None = never.
        max_forward_tokens: no generation starts once so many tokens went through the model; None = no limit.
        max_seconds: no generation starts after so long, interruptions not counted; None = no limit. Where it ends a
            search, another machine finds another schedule.
        min_sparsity, max_sparsity: bounds of a block's sparsity, one for all blocks or one per block.
        search_kv: whether the kv mode of every block is searched as well; else it is none of the search's business.
        seed: of all randomness.
    """

    budget: float
    step: float = 0.05
    generations: int = 15
    offspring: int = 8
    stage_windows: tuple[int, ...] = ()
    survivors: tuple[int, ...] = ()
    parents: int = 2
    tournament: int = 1
    switches: int = 2
    crossover: float = 0.3
    proposed: float = 0.75
    patience: int | None = None
    max_forward_tokens: int | None = None
    max_seconds: float | None = None
    min_sparsity: tuple[float, ...] = (0.0,)
    max_sparsity: tuple[float, ...] = (1.0,)
    search_kv: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("offspring", "parents", "tournament", "switches", "patience", "max_forward_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}, must be at least 1")
        if self.generations < 0:
            raise UserError(f"generations is {self.generations}, must be at least 0")
        for name in ("crossover", "proposed"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"{name} is {getattr(self, name)}, must be in [0, 1]")
        if not 0.0 <= self.budget < 1.0:
            raise UserError(f"budget is {self.budget}, must be in [0, 1)")
        self._check_stages()
        self._check_bounds()

    def stages(self, windows: int) -> list[tuple[int, int]]:
        """(windows, survivors) of each stage of a search on so many windows; one on all of them is the last, anyway."""
        asked = self.stage_windows or sorted({max(1, windows // 4), max(1, windows // 2)})
        halves = [max(1, self.offspring >> place) for place in range(1, len(asked) + 1)]
        return [(n, count) for n, count in zip(asked, self.survivors or halves) if n < windows]

    def _check_stages(self) -> None:
        windows, survivors = self.stage_windows, self.survivors
        if survivors and len(windows) != len(survivors):
            raise UserError(
                f"stage_windows has {len(windows)} stages, survivors {len(survivors)}\nGive one number for each stage."
            )
        if list(windows) != sorted(set(windows)) or list(survivors) != sorted(survivors, reverse=True):
            raise UserError(
                f"stage_windows are {list(windows)}, survivors {list(survivors)}: from stage to stage fewer children "
                "are measured on more windows"
            )
        if any(n < 1 for n in (*windows, *survivors)):
            raise UserError(f"stage_windows are {list(windows)}, survivors {list(survivors)}, must be at least 1")

    def _check_bounds(self) -> None:
        blocks = max(len(self.min_sparsity), len(self.max_sparsity))
        if {len(self.min_sparsity), len(self.max_sparsity)} - {1, blocks}:
            raise UserError(
                f"min_sparsity has {len(self.min_sparsity)} blocks, max_sparsity {len(self.max_sparsity)}\n"
                "Give one number, or one per block."
            )
        lower, upper = self.bounds(blocks)
        wrong = [block for block in range(blocks) if not 0.0 <= lower[block] <= upper[block] <= 1.0]
        if wrong:
            first = wrong[0]
            raise UserError(
                f"block {first} is to have a sparsity of {lower[first]} to {upper[first]}, must be in [0, 1]"
            )
        least, most = sum(lower) / blocks, sum(upper) / blocks
        if not least - 1e-9 <= self.budget <= most + 1e-9:
            raise UserError(
                f"a budget of {self.budget} does not fit: min_sparsity and max_sparsity allow {least:.4g} to {most:.4g}"
            )

    def bounds(self, num_blocks: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Lower and upper sparsity of each block; UserError where there are as many as another model has blocks."""
        try:
            return per_block(self.min_sparsity, num_blocks), per_block(self.max_sparsity, num_blocks)
        except ValueError as error:
            raise UserError(f"min_sparsity or max_sparsity: {error}\nGive one number, or one per block.") from None
