"""What a router is, and what it may look at.

Shapes, here and everywhere: B rows of a batch, T tokens of the routed part, padding included.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from ftp_lightning.errors import UserError
from ftp_lightning.schedule import Schedule

PARTS = ("block", "attention", "mlp")
"""What one decision addresses: a whole block, or one of its two halves."""
ADDRESSED = {"block": ("block",), "attention": ("attention",), "mlp": ("mlp",), "attention+mlp": ("attention", "mlp")}
"""What a pruner's decisions may address, and the parts that it decides for it."""


@dataclass(frozen=True)
class Scout:
    """A dense look at a prompt before it is routed: it costs what it runs, and is in the clock and in the FLOPs.

    Attributes:
        kind: "attention": the first `blocks` blocks run, and the look says the score that the last of them writes.
            "surprisal": the whole model runs with its output head, and the look says -log p(token | those before).
        blocks: how many blocks "attention" runs.
    """

    kind: Literal["attention", "surprisal"]
    blocks: int = 0


@dataclass(frozen=True)
class Needs:
    """What a router looks at.

    Attributes:
        attention: it reads `context.attention`.
        hidden: it reads `context.hidden`.
        once: "at first": it decides all blocks at the first routed one, and never reads what is written from there on;
            "from block 0": it decides all blocks from what the first block wrote; "": it decides block by block.
        adds_up: the attention table adds up what blocks write, from 0, in place of keeping the latest.
        reads: what the attention of a block says of its keys, (tapped, queries, keys, span) -> (scores, seen), see
            `pruning.scores`; None: the score of method.md, section 4.
        scout: a dense look at the prompt that it wants first, for `context.scouted`.
    """

    attention: bool = False
    hidden: bool = False
    once: Literal["", "at first", "from block 0"] = ""
    adds_up: bool = False
    reads: Callable | None = None
    scout: Scout | None = None


@dataclass(frozen=True)
class RoutingContext:
    """All that is known when the tokens of one block are routed.

    A prompt is ranked as a whole: `lengths` and `kept` are (B, 1). Continuation tokens are decided each as the last of
    its own text, token i with T_i = i + 1: `lengths` and `kept` are (B, T), `position` is `lengths` - 1, `rank` is
    given.

    Attributes:
        block: index of the block, from 0.
        sparsity: the schedule's requirement s_l for this block.
        real: (B, T) bool, False for padding.
        position: (B, T) int64, index of the token among the row's real tokens (arbitrary on padding).
        lengths: (B, 1) int64, real tokens of each row; (B, T) in a continuation.
        kept: like `lengths`, tokens that the schedule lets in (`pruning.decide.kept_tokens`).
        attention: (B, T) float32, the table of latest attention scores; None unless the router's `needs` name it.
        hidden: (B, T, D), the block's input.
        rank: (B, T) float32 in [0, 1], ascending rank of the attention score over n-1; None: it is computed from
            `attention`.
        schedule: the sparsity of all blocks.
        part: one of PARTS.
        memo: scratch of one forward, shared by the contexts of all its blocks; a router keeps what it carries from
            block to block under itself (`memo[self]`), so that two routers may look at one forward, and a factor that
            is the same in all blocks stays under its name.
        padded: False promises that `real` is all True.
        entered: (B, T) bool, the tokens that entered the last routed block before this one; None at the first.
        scouted: (B, T) float32, what the router's `scout` said of each token; None without one.
    """

    block: int
    sparsity: float
    real: Tensor
    position: Tensor
    lengths: Tensor
    kept: Tensor
    attention: Tensor | None = None
    hidden: Tensor | None = None
    rank: Tensor | None = None
    schedule: tuple[float, ...] = ()
    part: str = "block"
    memo: dict = field(default_factory=dict)
    padded: bool = True
    entered: Tensor | None = None
    scouted: Tensor | None = None


OWN_ROUTERS: dict[str, type[Router]] = {}
"""Router classes defined outside of this package, by the name that a pruned folder gives them."""
BUILT_IN: set[str] = set()
"""Names of the built-in routers, which no other class may take."""


class Router(nn.Module):
    """Gives each token of a block a score; high = compute.

    A router says what it needs and scores; how many tokens enter is `pruning.decide`'s business. `score` ranks the
    tokens (choice `topk`), `probability` is p_compute (choice `threshold`, the losses). In one forward both may be
    called for a block, in any order, with and without gradient, and again: the answer is the same each time.

    Attributes:
        needs: what it looks at.
        ranks_only: its scores order tokens and are no probabilities: choice "threshold" and the decode policies that
            skip are refused.
    """

    needs = Needs()
    ranks_only = False

    def __init_subclass__(cls, name: str | None = None, **kwargs) -> None:
        """Register a class that is defined outside of this package, so that pruned folders can name it.

        Args:
            name: what they call it, `class Mine(Router, name="mine")`; default: its module and class, "module.Mine".

        Raises:
            ValueError: a name that is empty, longer than 200 characters or not printable, or that of another class.
        """
        super().__init_subclass__(**kwargs)
        if cls.__module__.partition(".")[0] != __name__.partition(".")[0]:
            _register(cls, f"{cls.__module__}.{cls.__qualname__}" if name is None else name)

    def score(self, context: RoutingContext) -> Tensor:
        """(B, T) float32, the higher the sooner computed. Values on padding are ignored."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it scores tokens")

    def probability(self, context: RoutingContext) -> Tensor:
        """(B, T) float32 p_compute in [0, 1]."""
        return self.score(context)

    def check_model(self, num_blocks: int, hidden_size: int) -> None:
        """UserError where the router was made for another number of blocks or another hidden size."""

    def check_schedule(self, schedule: Schedule) -> None:
        """UserError where the router cannot decide under `schedule`."""

    def config(self) -> dict:
        """JSON-able arguments that rebuild the router (its weights are stored apart)."""
        return {}

    def identity(self) -> list:
        """JSON-able: the kind of the router, its arguments and its weights by content; equal routers decide alike."""
        weights = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            weights.update(f"{name}{tuple(value.shape)}".encode() + value.detach().cpu().double().numpy().tobytes())
        kind = type(self)
        return [f"{kind.__module__}.{kind.__qualname__}", self.config(), weights.hexdigest()[:16]]

    def forward(self, context: RoutingContext) -> Tensor:
        return self.score(context)

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def _register(kind: type[Router], name: str) -> None:
    known = OWN_ROUTERS.get(name)
    if not isinstance(name, str) or not 0 < len(name) <= 200 or not name.isprintable():
        raise ValueError(f"a router's name must be printable and have 1 to 200 characters, got {name!r}")
    if name in BUILT_IN:
        raise ValueError(f"the router name {name!r} is that of a built-in router")
    if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"the router name {name!r} is taken by {known.__module__}.{known.__qualname__}")
    OWN_ROUTERS[name] = kind  # a class that is defined again, as in a notebook, takes the place of its former self


def check_made_for(what: str, own: int, found: int) -> None:
    """UserError unless the router's `own` number of `what` ("blocks", "hidden units") is the model's."""
    if own != found:
        raise UserError(
            f"the router was made for a model with {own} {what}, this one has {found}.\n"
            "Use the model it was made for, or train a router for this one."
        )
