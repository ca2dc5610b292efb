"""Prompt deletion: the most surprising tokens are left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ftp_lightning.baselines.peer import Peer, even
from ftp_lightning.baselines.selectors import ScoutedSelector
from ftp_lightning.baselines.setting import Profile, Setting
from ftp_lightning.costs.budget import solve_budget
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing import Router
from ftp_lightning.routing.base import Needs, Scout
from ftp_lightning.schedule import Schedule


class SurprisalSelector(ScoutedSelector):
    """Score = -log p(token | those before), by a dense look with the whole model."""

    needs = Needs(scout=Scout("surprisal"))


class DeletionSurprisal(Peer):
    """Selective Context (Li et al. 2023, arXiv 2310.06201): tokens of low self-information are cut out of the prompt.

    Adapted: by token instead of by phrase; original positions; scored by the model itself, the only one at hand. That
    look costs a whole prefill and a logit for every token, so no FLOPs are left to save: it is placed where its
    deletion alone makes the cut, and its rows tell the cut with the look charged, which is negative.
    """

    name, title = "deletion_surprisal", "prompt deletion, surprisal (look charged)"
    paper = "Selective Context, arXiv 2310.06201"
    own_schedule_only = True

    def tries(self, setting: Setting) -> Iterator[tuple[Router, Schedule]]:
        yield SurprisalSelector(), even(setting.blocks)

    def placed(
        self, setting: Setting, cut: float, profile: Profile, form: Schedule | None, kv: str | None
    ) -> TokenPruner:
        about: dict[str, Any] = {"rank": setting.rank, "new_tokens": profile.new_tokens}
        schedule = solve_budget(setting.model, cut, profile.prompt_tokens, self.kv, **about)
        return self.pruner(setting, SurprisalSelector(), schedule)
