"""What one block wrote into the table of attention scores, and what it said before, so that a cache can be cropped.

Shapes: B rows, t states, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.errors import UserError

if TYPE_CHECKING:
    from ftp_lightning.pruning.cache import RoutedLayer
    from ftp_lightning.pruning.kept import Tokens

UNWRITTEN = -1.0
"""No score yet; scores are never negative."""
ROLLBACK = 128
"""Continuation tokens that can be taken back for certain [ours]: each costs B x S float32 per block that is logged."""


@dataclass(eq=False)
class _Entry:
    """states (B, t, S): the scores as they stood once `first`, `first` + 1, ... tokens had been seen."""

    first: int
    states: Tensor
    prompt: bool

    @property
    def last(self) -> int:
        return self.first + self.states.shape[1] - 1


class ScoreLog:
    """Every query that is computed overwrites the scores of the keys it sees; taking its token back brings back what
    stood there. Kept are the states after the last prompt and after each of the last ROLLBACK tokens, at least."""

    def __init__(self):
        self._entries: list[_Entry] = []

    @property
    def latest(self) -> Tensor | None:
        """(B, S) float32, the score written last of every slot; None before the first."""
        return self._entries[-1].states[:, -1] if self._entries else None

    def add(self, first: int, states: Tensor, prompt: bool = False) -> None:
        """states (B, t, S) after `first` tokens, after one more, and so on."""
        if states.shape[1] > ROLLBACK + 1:
            first += states.shape[1] - ROLLBACK - 1
            states = states[:, -ROLLBACK - 1 :].clone()
        entry = _Entry(first, states, prompt)
        entries = [*self._entries, entry]
        last_prompt = next((e for e in reversed(entries) if e.prompt), None)
        self._entries = [e for e in entries if e.last >= entry.last - ROLLBACK or e is last_prompt]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Move rows."""
        self._entries = [_Entry(e.first, change(e.states), e.prompt) for e in self._entries]

    def roll_back(self, seen: int) -> None:
        """Forget all but the first `seen` tokens. UserError where the scores of that time are not known."""
        if not self._entries:
            return
        kept = [e for e in self._entries if e.first <= seen]
        if not kept or (kept[-1].last < seen and len(kept) < len(self._entries)):
            raise UserError(
                f"this cache cannot go back to its first {seen} tokens: under a decode policy it remembers attention "
                f"scores at the end of a prompt and for the last {ROLLBACK} continuation tokens.\n"
                "Start from a copy of the cache that was taken there, or use decode='dense'."
            )
        self._entries = [_Entry(e.first, e.states[:, : seen - e.first + 1, :seen], e.prompt) for e in kept]


def log_of(layer: RoutedLayer) -> ScoreLog:
    """The layer's log, which is there once a decode policy has asked for it."""
    layer.scores = ScoreLog() if layer.scores is None else layer.scores
    return layer.scores


def remember_prompt(layer: RoutedLayer, scores: Tensor, seen: Tensor, keys: Tokens, span: int) -> None:
    """Keep with the layer what a prompt's block wrote: scores, seen (B, K) of the keys' slots; `span` slots seen."""
    fresh = scores.new_full((scores.shape[0], span), UNWRITTEN)
    fresh = fresh.scatter_reduce(1, keys.slots, torch.where(seen, scores, UNWRITTEN), "amax")
    log_of(layer).add(span, torch.where(fresh >= 0, fresh, stored_scores(layer, fresh))[:, None], prompt=True)


def stored_scores(layer: RoutedLayer, like: Tensor) -> Tensor:
    """What the layer wrote last, brought to the shape (B, S) of `like`."""
    known = log_of(layer).latest
    known = like[:, :0] if known is None else known
    return torch.cat([known, like.new_full((len(like), like.shape[1] - known.shape[1]), UNWRITTEN)], 1)
