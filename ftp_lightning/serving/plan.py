"""Which pruner a request gets: the server's, or one of another budget, or none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftp_lightning.costs.least_tokens import least_tokens
from ftp_lightning.costs.per_block import BlockCost, block_costs
from ftp_lightning.disk.ready import load_pruner
from ftp_lightning.errors import UserError
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import StaticRouter
from ftp_lightning.schedule import Schedule
from ftp_lightning.schedule_family import ScheduleFamily, holds_family
from ftp_lightning.serving.options import Ask, Served

DEFAULT_BUDGET = 0.3
"""The budget of a request that wants pruning and says no budget, where no pruner and no flag says one."""


@dataclass(frozen=True)
class Plan:
    """Schedules by budget, and the pruner that carries them.

    A stored pruner or schedule is known to be good at its own budget; below it the schedule is interpolated towards
    dense (`ScheduleFamily.at`), above it budgets are refused. Without either every budget has its `Schedule.default`
    under the static router.

    Attributes:
        budget: of requests that give none.
        kv: modes in place of those of the schedules, see `Schedule`; None: theirs.
    """

    blocks: int
    pruner: TokenPruner | None
    family: ScheduleFamily | None
    budget: float
    kv: str | tuple[str, ...] | None = None

    @classmethod
    def of(cls, served: Served, blocks: int) -> Plan:
        """UserError where the pruner or the schedule is for another number of blocks, cannot be read, or does not reach
        the budget."""
        pruner = load_pruner(served.pruned) if served.pruned else None
        family, budget = None, served.budget
        if served.schedule:
            family = _family(served.schedule)
        elif pruner is not None:
            family = pruner.family or ScheduleFamily([pruner.scheduled])
            budget = pruner.scheduled.budget if budget is None else budget
        if family is not None and family.num_blocks != blocks:
            name = served.schedule or served.pruned
            raise UserError(
                f"{name} is made for {family.num_blocks} blocks, the model has {blocks}\nGive the one of this model."
            )
        if budget is None:
            budget = DEFAULT_BUDGET if family is None else family.budgets[-1]
        plan = cls(blocks, pruner, family, budget, served.kv)
        try:
            plan.schedule(budget)
        except UserError:
            raise
        except ValueError as error:  # modes for another number of blocks
            raise UserError(f"{error}\nGive --kv one mode, or one per block.") from None
        return plan

    @property
    def most(self) -> float:
        """The largest budget that the page offers: the family's, or 0.9."""
        return 0.9 if self.family is None else self.family.budgets[-1]

    def schedule(self, budget: float | None) -> Schedule:
        """The schedule of a budget. UserError above what was searched."""
        budget = self.budget if budget is None else budget
        if self.family is None:
            return Schedule.default(self.blocks, budget, self.kv)
        found = self.family.at(budget)
        return found if self.kv is None else found.under(self.kv)

    def pruner_of(self, budget: float | None) -> TokenPruner:
        """A pruner under the schedule of a budget, for a model whose identity has been checked.

        Prompts of any length are routed.
        """
        schedule = self.schedule(budget)
        if self.pruner is None:
            return TokenPruner(StaticRouter(), schedule if schedule.kv else schedule.under("keep"))
        pruner = self.pruner.changed(schedule=schedule, least_tokens=0)
        pruner._base = None  # else every `attach` would read the weights again
        return pruner


def _family(path: str) -> ScheduleFamily:
    """The schedules of a file, which may hold a single one."""
    file = Path(path).expanduser()
    return ScheduleFamily.load(file) if holds_family(path) else ScheduleFamily([Schedule.load(file)])


class Pruners:
    """The pruners of a plan on one model, each made once.

    `chosen` says of a request which one it gets, and of one that gets none why: "off", "budget 0", "structured",
    "short".
    """

    KEPT = 32

    def __init__(self, plan: Plan, served: Served, model: Any):
        self.plan, self.served, self.model = plan, served, model
        self._made: dict[float, tuple[TokenPruner, int]] = {}
        self._costs: dict[int, list[BlockCost]] = {}

    def chosen(self, ask: Ask) -> tuple[TokenPruner | None, str]:
        budget = self.plan.budget if ask.budget is None else ask.budget
        if ask.mode == "off":
            return None, "off"
        if budget == 0:
            return None, "budget 0"
        if ask.mode == "auto" and self.served.dense_structured and ask.structured:
            return None, "structured"
        pruner, least = self._of(budget)
        if ask.mode == "auto" and len(ask.ids) < least:
            return None, "short"
        return pruner, ""

    def block_costs(self, pruner: TokenPruner) -> list[BlockCost]:
        """Costs of the model's blocks under a pruner, counted once for each skip rank."""
        rank = pruner.skip_rank
        if rank not in self._costs:
            self._costs[rank] = block_costs(self.model, rank)
        return self._costs[rank]

    def _of(self, budget: float) -> tuple[TokenPruner, int]:
        if budget not in self._made:
            if len(self._made) >= self.KEPT:
                self._made.pop(next(iter(self._made)))
            pruner = self.plan.pruner_of(budget)
            self._made[budget] = pruner, self._least(pruner)
        return self._made[budget]

    def _least(self, pruner: TokenPruner) -> int:
        """Tokens from which on `auto` prunes."""
        if self.served.least_tokens != "auto":
            return int(self.served.least_tokens)
        return least_tokens(self.model, pruner.scheduled, pruner.kv)
