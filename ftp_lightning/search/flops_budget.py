"""A budget of FLOPs where kv modes are searched: every schedule is scaled to the cut, as modes cost differently."""

from __future__ import annotations

from torch import nn

from ftp_lightning.costs.budget import OutOfReach, solve_budget
from ftp_lightning.schedule import Schedule

LEAST = 0.01
"""Sparsity that a dense block counts as where the others cannot save enough [ours]."""


class FlopsCut:
    """Schedule with modes -> the one of the same form and modes whose FLOPs cut is nearest `cut` (`solve_budget`).

    All sparsities are scaled by one factor, so dense blocks stay dense. Only where the other blocks cannot save so much
    do dense blocks begin to skip, too [ours].

    Args:
        cut: share of a prompt's FLOPs to save.
        length: tokens of that prompt.
        rank: `TokenPruner.skip_rank`.

    Raises:
        UserError: when called, where the cut is more than can be saved in these modes.
    """

    def __init__(self, model: nn.Module, cut: float, length: int, rank: int = 0):
        self.model, self.cut, self.length, self.rank = model, cut, length, rank
        self._found: dict[Schedule, Schedule] = {}

    def __call__(self, schedule: Schedule) -> Schedule:
        if schedule not in self._found:
            self._found[schedule] = self._solved(schedule)
        return self._found[schedule]

    def _solved(self, schedule: Schedule) -> Schedule:
        assert schedule.kv is not None  # `genetic_search` refuses seeds without modes
        try:
            return solve_budget(self.model, self.cut, self.length, schedule.kv, schedule, rank=self.rank)
        except OutOfReach:
            form = Schedule([max(s, LEAST) for s in schedule.sparsity], schedule.kv)
            return solve_budget(self.model, self.cut, self.length, form.kv or (), form, rank=self.rank)

    def __repr__(self) -> str:
        return f"FlopsCut({self.cut}, {self.length}, {self.rank})"
