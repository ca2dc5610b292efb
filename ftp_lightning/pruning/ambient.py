"""What a thread is doing with a pruner. State of one call belongs to the call: several threads may use one pruner."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ftp_lightning.attention_score import Span
from ftp_lightning.training.gates import StraightThrough

if TYPE_CHECKING:
    from ftp_lightning.pruning.forward import Forward
    from ftp_lightning.pruning.generation import Generation
    from ftp_lightning.pruning.trace import Routing, Trace


@dataclass(frozen=True)
class Training:
    """The forward that training needs: the first `prompt_tokens` of each row are routed, with these gates; `recompute`:
    backward computes whole blocks again instead of keeping what they computed."""

    prompt_tokens: int
    gates: StraightThrough = field(default_factory=StraightThrough)
    recompute: bool = False


@dataclass
class Latest:
    """(thread, trace, what the router said if it was a training one) of the last forward in any thread."""

    told: tuple[int, Trace, list[Routing]]


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
        last: the trace of the last forward, and what the router said in it if it was a training one.
    """

    forward: Forward | None = None
    generation: Generation | None = None
    routes_chunks: bool = False
    training: Training | None = None
    spans: tuple[Span, ...] = ()
    stock: bool = False
    last_tokens: int | None = None
    last: tuple[Trace, list[Routing]] | None = None

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
