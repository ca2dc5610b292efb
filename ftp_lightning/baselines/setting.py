"""What a peer is placed with: the model, what it is calibrated on, and the request that is to become cheaper."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ftp_lightning.errors import UserError
from ftp_lightning.schedule import Schedule
from ftp_lightning.training.compensation import Compensation, fit_compensation


@dataclass(frozen=True)
class Profile:
    """The request whose FLOPs are cut: a prompt, and so many forwards of one token after it."""

    prompt_tokens: int = 1024
    new_tokens: int = 0


@dataclass
class Setting:
    """What a peer may look at; nothing of it is test data.

    Attributes:
        model: in eval mode, nothing attached.
        seed: of the random ones.
        windows: calibration text (`data.rows.Rows`); None: peers that are calibrated are refused.
        influence: Block Influence of every block, as `sensitivity` measures it; empty: not known.
        searched: the schedule that was searched for; its form alone counts, it is scaled to the budget.
        rank: of the compensation that every peer gets; 0: none gets one.
        given, given_parts: a compensation fitted before, and the parts that it is about; it goes before `rank`.
        memo: what was found once and serves all budgets (compensations, removal orders).
    """

    model: nn.Module
    seed: int = 0
    windows: Any = None
    influence: tuple[float, ...] = ()
    searched: Schedule | None = None
    rank: int = 0
    given: Compensation | None = None
    given_parts: str | tuple[str, ...] = "block"
    memo: dict = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.model.config.get_text_config().hidden_size

    def skip_rank(self, parts: str) -> int:
        """Rank of what skipped tokens of these parts are multiplied with."""
        if self.given is None:
            return self.rank
        return self.given.rank if parts == self.given_parts else 0

    def needed(self, name: str, peer: str) -> Any:
        """UserError where something that a peer needs is not there."""
        found = getattr(self, name)
        if found is None or not len(found):
            raise UserError(f"the peer {peer} needs `{name}`, which this setting does not have.\nMeasure it first.")
        return found

    def compensation(self, parts: str) -> Compensation | None:
        """What skipped tokens of these parts get, given or fitted once; None: they keep their state."""
        if self.given is not None:
            return self.given if parts == self.given_parts else None
        if not self.rank:
            return None
        if ("compensation", parts) not in self.memo:
            windows = self.needed("windows", "compensation")
            self.memo["compensation", parts] = fit_compensation(self.model, windows, self.rank, parts=parts)
        return self.memo["compensation", parts]
