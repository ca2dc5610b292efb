"""Peers that remove parts of the model for every token: an order of parts, and how far down it a cut reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ftp_lightning.baselines.peer import Peer
from ftp_lightning.baselines.setting import Profile, Setting
from ftp_lightning.costs.budget import OutOfReach
from ftp_lightning.costs.request import planned_cut
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import StaticRouter
from ftp_lightning.schedule import Schedule

Part = tuple[int, str]
"""(block, "block" or "attention" or "mlp")."""


class RemovalPeer(Peer):
    """Removes the first k parts of its order, prompt and continuation alike; k is the one whose planned cut is nearest
    the one asked for: removal has no finer steps, so the rows tell the cut that was realised. A schedule it has not:
    no token of a part that is left skips."""

    own_schedule_only = True

    def order(self, setting: Setting) -> Iterator[Part]:
        """Parts, the one that goes first at the head."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it removes")

    def placed(
        self, setting: Setting, cut: float, profile: Profile, form: Schedule | None, kv: str | None
    ) -> TokenPruner:
        best: Any = None
        off, removed = float("inf"), list[Part]()
        for part in self.order(setting):
            removed.append(part)
            pruner = self.without(setting, removed)
            reached = planned_cut(setting.model, pruner, profile.prompt_tokens, profile.new_tokens)
            if abs(reached - cut) < off:
                best, off = pruner, abs(reached - cut)
            if reached >= cut:
                return best
        raise OutOfReach(f"{self.name} cannot cut {cut:.0%} of the FLOPs: everything else that is left must stay.")

    def without(self, setting: Setting, removed: Sequence[Part]) -> TokenPruner:
        none = Schedule.uniform(setting.blocks, 0.0)
        return self.pruner(setting, StaticRouter(), none, removed=tuple(removed))


def greedy_order(parts: Sequence[Part], measure: Callable[[list[Part]], float]) -> Iterator[Part]:
    """Parts in the order in which a greedy removal takes them: each time the one without which `measure` of all that is
    removed is least; ties go to the earlier part. Measures only as far as it is asked for."""
    left = list(parts)
    removed: list[Part] = []
    while left:
        losses = [measure([*removed, part]) for part in left]
        best = left.pop(losses.index(min(losses)))
        removed.append(best)
        yield best
