"""What a thread is doing with a pruner. State of one call belongs to the call: several threads may use one pruner."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ftp_lightning.attention_score import Span
from ftp_lightning.errors import UserError
from ftp_lightning.training.gates import StraightThrough

if TYPE_CHECKING:
    from ftp_lightning.pruning.forward import Forward, Routing
    from ftp_lightning.pruning.generation import Generation
    from ftp_lightning.pruning.trace import Trace


@dataclass(frozen=True)
class Training:
    """The forward that training needs: the first `prompt_tokens` of each row are routed, with these gates; `recompute`:
    backward computes whole blocks again instead of keeping what they computed."""

    prompt_tokens: int
    gates: StraightThrough = field(default_factory=StraightThrough)
    recompute: bool = False


class Ambient(threading.local):
    """Each thread has one of its own, and so has each copy.

    Attributes:
        forward: the forward that is running; None between forwards.
        generation: the call of `generate` that is running.
        routes_chunks: inside `TokenPruner.prompt`.
        training: inside `TokenPruner.masked`.
        spans: inside `TokenPruner.question`, the spans of the prompts' questions.
        stock: the model runs as it is, for a scout.
        last_tokens: how many last positions of this forward's hidden states are read; None: perhaps all.
        trace, routings: of the last forward.
    """

    forward: Forward | None = None
    generation: Generation | None = None
    routes_chunks: bool = False
    training: Training | None = None
    spans: tuple[Span, ...] = ()
    stock: bool = False
    last_tokens: int | None = None
    trace: Trace | None = None
    routings: list[Routing] | None = None

    def __reduce__(self):
        return Ambient, ()

    @contextmanager
    def having(self, **values) -> Iterator[None]:
        """Inside, this thread has these values."""
        before = {name: getattr(self, name) for name in values}
        for name, value in values.items():
            setattr(self, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)


class Gate:
    """Lets calls run side by side, and closes between them; a call that comes later runs the stock model."""

    def __init__(self):
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}  # thread -> how deep it is in calls
        self._state = "open"

    def __reduce__(self):
        return Gate, ()

    def enter(self) -> bool:
        """Whether the call may run pruned; then `leave` ends it. Waits while another thread waits to close."""
        own = threading.get_ident()
        with self._changed:
            if own not in self._inside:
                self._changed.wait_for(lambda: self._state != "closing")
                if self._state == "closed":
                    return False
            self._inside[own] = self._inside.get(own, 0) + 1
            return True

    def leave(self) -> None:
        own = threading.get_ident()
        with self._changed:
            self._inside[own] -= 1
            if not self._inside[own]:
                del self._inside[own]
                self._changed.notify_all()

    def close(self) -> bool:
        """Wait until no call is running, and let no more in; False where another thread has closed it.

        Where the wait is interrupted (Ctrl-C) it stays open. UserError inside a call of the same thread.
        """
        with self._changed:
            if threading.get_ident() in self._inside:
                raise UserError("a pruner cannot be detached while its model is running.\nDetach it after the call.")
            if self._state == "closed":
                return False
            self._state = "closing"
            try:
                self._changed.wait_for(lambda: not self._inside)
            except BaseException:
                self._state = "open" if self._state == "closing" else self._state
                self._changed.notify_all()
                raise
            before, self._state = self._state, "closed"
            self._changed.notify_all()
            return before != "closed"
