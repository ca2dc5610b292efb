"""What a peer is: another method behind the pruner's interface, placed at a wanted FLOPs cut, really skipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ftp_lightning.baselines.setting import Profile, Setting
from ftp_lightning.costs.budget import OutOfReach, solve_budget
from ftp_lightning.costs.request import scout_flops
from ftp_lightning.errors import UserError
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import Router
from ftp_lightning.schedule import Schedule


class Peer:
    """A selector of tokens with a schedule of its own; what is no selector, or has no budget, overwrites `placed`.

    Attributes:
        name: of its rows. title: as tables show it. paper: where it comes from.
        kv, parts, window, attention: of its pruner, see `TokenPruner`.
        most: its own schedule stays at or below this sparsity where one of its `tries` can.
        seeded: differs by seed. trained: its router has to be trained. own_schedule_only: it is nothing under another.
    """

    name = title = paper = ""
    kv, parts, window, attention = "evict", "block", 32, "window"
    most = 1.0
    seeded = trained = own_schedule_only = False

    def tries(self, setting: Setting) -> Iterator[tuple[Router, Schedule]]:
        """Routers, each with the form of the schedule that goes with it, the preferred one first. A form is scaled to
        the budget by one factor: s_l -> min(1, c s_l)."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it selects")

    def place(
        self, setting: Setting, cut: float, profile: Profile, form: Schedule | None = None, kv: str | None = None
    ) -> TokenPruner:
        """The pruner whose planned FLOPs cut of the profile's request is nearest `cut`, under the peer's own schedule
        or one of another `form`. `OutOfReach` where that cannot be."""
        if form is not None and self.own_schedule_only:
            raise UserError(f"{self.name} works under its own schedule only.\nLeave the other one out.")
        return self.placed(setting, cut, profile, form, kv)

    def placed(
        self, setting: Setting, cut: float, profile: Profile, form: Schedule | None, kv: str | None
    ) -> TokenPruner:
        """`place`, once what is asked for makes sense."""
        found: list[tuple[Router, Schedule]] = []
        for router, own in self.tries(setting):
            try:
                schedule = self._scaled(setting, cut, profile, router, form or own, kv or self.kv)
            except OutOfReach as error:
                reason = error
                continue
            if form is not None or max(schedule.sparsity) <= self.most:
                return self.pruner(setting, router, schedule, kv)
            found.append((router, schedule))
        if not found:
            raise reason
        return self.pruner(setting, *min(found, key=lambda one: max(one[1].sparsity)), kv)

    def _scaled(
        self, setting: Setting, cut: float, profile: Profile, router: Router, form: Schedule, kv: str
    ) -> Schedule:
        look = scout_flops(setting.model, router.needs.scout, profile.prompt_tokens)
        about: dict[str, Any] = {
            "parts": self.parts,
            "rank": setting.skip_rank(self.parts),
            "new_tokens": profile.new_tokens,
        }
        return solve_budget(setting.model, cut, profile.prompt_tokens, kv, form, extra=look, **about)

    def pruner(
        self, setting: Setting, router: Router, schedule: Schedule, kv: str | Sequence[str] | None = None, **more
    ) -> TokenPruner:
        """The pruner of this peer; `more` are arguments of `TokenPruner`."""
        compensation = setting.compensation(self.parts)
        skip = "identity" if compensation is None else "low-rank" if compensation.rank else "mean"
        about: dict[str, Any] = {"parts": self.parts, "window": self.window, "attention": self.attention}
        own = schedule.under(None)  # the mode is the peer's, whatever a searched schedule was found for
        return TokenPruner(router, own, kv=kv or self.kv, skip=skip, compensation=compensation, **about | more)


def even(blocks: int) -> Schedule:
    """The same in every block."""
    return Schedule.uniform(blocks, 1.0)


def first_dense(form: Schedule) -> Schedule:
    """The form with its first block dense: what stands for a common schedule, so that selectors which read attention
    have something to read."""
    return Schedule([0.0, *form.sparsity[1:]])


def from_block(blocks: int, first: int) -> Schedule:
    """Dense below block `first`, the same from there on."""
    return Schedule([float(block >= first) for block in range(blocks)])


def steps(blocks: int) -> Schedule:
    """Progressive: a dense quarter, then one, two and three thirds of a share in one quarter of the blocks each."""
    return Schedule([min(3, 4 * block // blocks) / 3 for block in range(blocks)])


def ramp(blocks: int) -> Schedule:
    """Rising evenly from a dense first block."""
    return Schedule([block / max(1, blocks - 1) for block in range(blocks)])


def ever_flatter(form: Schedule) -> Iterator[Schedule]:
    """The form, then ever flatter ones, to the same sparsity in all blocks that it prunes.

    A high budget drives the last blocks of a rising form to a sparsity of 1, where nothing is left to select.
    """
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        yield Schedule([(1.0 - share) * s + share if s else 0.0 for s in form.sparsity])


FORMS = ("own", "first dense", "searched")


def best_form(
    peer: Peer, setting: Setting, cut: float, profile: Profile, measure: Callable[[TokenPruner], float]
) -> tuple[str, TokenPruner]:
    """The peer under the best of its own schedule, the uniform one behind a dense first block, and the searched one.

    A rival is judged by its selector: it is not to lose by a schedule that we gave it.

    Args:
        peer: one with `own_schedule_only` is asked under its own schedule alone.
        setting: without `searched` that form is left out.
        cut: FLOPs cut of the profile's request.
        measure: loss on validation rows, the lower the better; it may train the pruner's router.

    Returns:
        (name of FORMS, pruner); of equal losses the earlier form.

    Raises:
        OutOfReach: no form reaches the cut.
    """
    forms: dict[str, Schedule | None] = {"own": None}
    if not peer.own_schedule_only:
        forms["first dense"] = first_dense(even(setting.blocks))
        if setting.searched is not None:
            forms["searched"] = setting.searched
    found: dict[str, tuple[float, TokenPruner]] = {}
    for name, form in forms.items():
        try:
            pruner = peer.place(setting, cut, profile, form)
        except OutOfReach as error:
            reason = error
            continue
        loss = measure(pruner)
        found[name] = (math.inf if math.isnan(loss) else loss, pruner)
    if not found:
        raise reason
    best = min(found, key=lambda name: found[name][0])
    return best, found[best][1]
