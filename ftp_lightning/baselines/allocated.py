"""A router under a named way to spread a budget: what every search and training has to beat, and what they find."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ftp_lightning.baselines.peer import Peer
from ftp_lightning.baselines.setting import Profile, Setting
from ftp_lightning.costs.budget import default_with_cut
from ftp_lightning.errors import UserError
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import DynamicRouter, Router, StaticRouter
from ftp_lightning.schedule import Schedule

FORM_BUDGET = 0.3
"""The budget at which a spread is formed before one factor scales it to a FLOPs cut [ours]."""


class Allocated(Peer):
    """Spreads a budget over the blocks by a rule, so that it can be compared at equal tokens as well as at equal FLOPs.

    The static router decides unless a subclass names another one.
    """

    def spread(self, setting: Setting, budget: float) -> Schedule:
        """The schedule of this budget."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it spreads a budget")

    def router(self, setting: Setting) -> Router:
        return StaticRouter()

    def tries(self, setting: Setting) -> Iterator[tuple[Router, Schedule]]:
        yield self.router(setting), self.spread(setting, FORM_BUDGET)

    def equal_tokens(self, setting: Setting, chosen: TokenPruner) -> TokenPruner:
        """This method at the budget of `chosen`, with its other settings: kv, skip, parts, decode, window."""
        return chosen.changed(router=self.router(setting), schedule=self.spread(setting, chosen.scheduled.budget))


class Uniform(Allocated):
    """The same sparsity in all blocks, static router (FTP, arXiv 2412.11494)."""

    name, title, paper = "uniform", "static router, uniform", "FTP, arXiv 2412.11494"

    def spread(self, setting: Setting, budget: float) -> Schedule:
        return Schedule.uniform(setting.blocks, budget)


class Default(Allocated):
    """`Schedule.default` with the static router: what somebody gets who says nothing but a budget [ours]."""

    name, title, paper = "default", "static router, default schedule", "ours"
    own_schedule_only = True

    def spread(self, setting: Setting, budget: float) -> Schedule:
        return Schedule.default(setting.blocks, budget)

    def placed(
        self, setting: Setting, cut: float, profile: Profile, form: Schedule | None, kv: str | None
    ) -> TokenPruner:
        schedule = default_with_cut(setting.model, cut, profile.prompt_tokens, kv)
        return self.pruner(setting, StaticRouter(), schedule, schedule.kv)


class FirstDense(Allocated):
    """The first block dense, the same sparsity in all others, static router [ours].

    The plainest schedule that does not prune raw embeddings.
    """

    name, title, paper = "first_dense", "static router, first block dense", "ours"

    def spread(self, setting: Setting, budget: float) -> Schedule:
        from ftp_lightning.search.allocations import step

        return step(setting.blocks, budget, 1)


class BlockInfluence(Allocated):
    """Less sparsity where Block Influence, 1 - cos(input, output), is high; static router.

    After ShortGPT (arXiv 2403.03853), which removes whole blocks by it."""

    name, title, paper = "block_influence", "static router, Block Influence", "ShortGPT, arXiv 2403.03853"

    def spread(self, setting: Setting, budget: float) -> Schedule:
        from ftp_lightning.search.allocations import from_importance

        return from_importance(setting.needed("influence", self.name), budget)


class Static(Allocated):
    """The schedule that was searched with the static router (FTP, arXiv 2412.11494, Section 3.3)."""

    name, title, paper = "static", "static router, searched", "FTP, arXiv 2412.11494"
    kv = "keep"

    def spread(self, setting: Setting, budget: float) -> Schedule:
        if setting.searched is None:
            raise UserError(f"{self.name} needs a searched schedule.\nGive one, or search it.")
        return setting.searched


class Dynamic(Static):
    """FTP's router of 450 parameters under the searched schedule (arXiv 2412.11494, Section 4.3).

    The router is made, not trained: whoever compares it trains it.
    """

    name, title = "dynamic", "trained router, searched"
    trained = seeded = True

    def router(self, setting: Setting) -> Router:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            return DynamicRouter()
