"""What a token's attention score is made of: whose queries, which heads, how many blocks, which neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ftp_lightning.errors import UserError
from ftp_lightning.schedule import first_routed

DEFAULT_WINDOW = 32
_ALLOWED = {"heads": ("mean", "max"), "blocks": ("latest", "max"), "pooling": ("none", "max", "average")}

Span = tuple[int, int]
"""[start, end): places among the real tokens of a row."""


@dataclass(frozen=True)
class AttentionScore:
    """The attention that a token receives, as routers read it. Pass it as `TokenPruner(attention=AttentionScore(...))`.

    For token j in one block, with P_hij the attention of query i to key j in head h and n_i the number of keys that
    query i sees:

        a_j = pool over neighbours of j ( reduce over heads h ( mean over queries i that see j of n_i * P_hij ) )

    Uniform attention gives 1 under every option. The defaults are the score that `attention="window"` stands for. All
    other options are [ours], but for pooling, which is that of SnapKV (arXiv 2404.14469, Section 4).

    Args:
        window: the queries that are averaged over: a number = the last `window` computed tokens of each row; "exact" =
            all computed tokens; "question" = the computed tokens of a span that every prompt is given by
            `with pruner.question(spans):`.
        window_end: tokens at the end of each prompt whose queries are left out, because a chat template puts them
            there (`data.chat.chat_question` counts them). A prompt that has no other tokens writes no score.
        heads: "mean" over the query heads, or "max": the score of the head that attends to the token most.
        blocks: "latest": a router reads what the last block in which the token was a key wrote (paper). "max": it reads
            the greatest score of all blocks so far. (first, end): the greatest score of the blocks first to end - 1
            alone, so that all blocks from `end` on rank the tokens alike. No block up to `first` may then be pruned.
        pooling: "none", or "max" or "average" over the `kernel_size` tokens around j, of those that have a score.
            Neighbours are neighbours in the row's text: padding is passed over, skipped tokens have no score.
        kernel_size: width of the pooling, odd, with j in the middle.

    Raises:
        UserError: a value that is unknown or out of range, or an option that changes nothing beside another one.

    Example:
        >>> score = AttentionScore(window=8, window_end=5, heads="max", blocks="max", pooling="max", kernel_size=7)
        >>> pruner = TokenPruner(UntrainedRouter(), schedule, attention=score)
    """

    window: int | Literal["exact", "question"] = DEFAULT_WINDOW
    window_end: int = 0
    heads: Literal["mean", "max"] = "mean"
    blocks: Literal["latest", "max"] | tuple[int, int] = "latest"
    pooling: Literal["none", "max", "average"] = "none"
    kernel_size: int = 7

    def __post_init__(self) -> None:
        if isinstance(self.blocks, list):  # of a JSON file
            object.__setattr__(self, "blocks", tuple(self.blocks))
        for name, allowed in _ALLOWED.items():
            if name == "blocks" and isinstance(self.blocks, tuple):
                _check_blocks(self.blocks)
            elif getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(allowed)}.")
        if isinstance(self.window, str) and self.window not in ("exact", "question"):
            raise UserError(f"window is {self.window!r}; must be a number of queries, exact or question.")
        if not isinstance(self.window, str) and not _is_count(self.window, 1):
            raise UserError(f"window is {self.window}, must be at least 1 query.")
        if not _is_count(self.window_end, 0):
            raise UserError(f"window_end is {self.window_end}, must be a whole number of tokens, at least 0.")
        if not _is_count(self.kernel_size, 3) or self.kernel_size % 2 == 0:
            raise UserError(f"kernel_size is {self.kernel_size}, must be an odd whole number, at least 3.")
        if self.window == "question" and self.window_end:
            raise UserError(
                "window_end cannot be combined with window='question', which has its own end: leave it out."
            )
        if self.pooling == "none" and self.kernel_size != AttentionScore.kernel_size:
            raise UserError("kernel_size has no effect without pooling: add pooling='max' or pooling='average'.")

    @property
    def greatest(self) -> bool:
        """Whether a router reads the greatest of several scores, in place of the latest."""
        return self.blocks != "latest"

    def reads(self, block: int) -> bool:
        """Whether what `block` says may be read."""
        return not isinstance(self.blocks, tuple) or self.blocks[0] <= block < self.blocks[1]

    def ends_by(self, block: int) -> bool:
        """Whether nothing is read that `block` or a later one says."""
        return isinstance(self.blocks, tuple) and self.blocks[1] <= block

    def check_schedule(self, sparsity: Sequence[float]) -> None:
        """UserError where (first, end) of `blocks` does not fit a schedule of this sparsity per block."""
        if not isinstance(self.blocks, tuple):
            return
        first, end = self.blocks
        if end > len(sparsity):
            raise UserError(f"the attention of blocks {first} to {end - 1} is read, and there are {len(sparsity)}.")
        routed = first_routed(sparsity)
        if routed is not None and routed <= first:
            raise UserError(
                f"block {routed} is pruned before the blocks {first} to {end - 1}, whose attention decides, have run.\n"
                f"Prune from block {first + 1} on, or read the attention of earlier blocks."
            )

    @staticmethod
    def of(attention: str | AttentionScore | Mapping[str, Any], window: int = DEFAULT_WINDOW) -> AttentionScore:
        """What the arguments `attention` and `window` of a `TokenPruner` say together; a mapping is what `said` gives.

        Raises:
            UserError: an unknown name, or a `window` that contradicts an AttentionScore.
        """
        if isinstance(attention, AttentionScore):
            if window not in (DEFAULT_WINDOW, attention.window):
                raise UserError(
                    f"window={window} cannot be combined with {attention}, which has its own window. Leave window out."
                )
            return attention
        if isinstance(attention, Mapping):
            return AttentionScore(**{"window": window, **attention})
        plain = AttentionScore(window)
        if attention not in ("window", "exact"):
            raise UserError(f"attention is {attention!r}, must be window, exact or an AttentionScore.")
        return plain if attention == "window" else AttentionScore("exact")

    def said(self) -> str | dict[str, Any]:
        """JSON-able, for `of`: "window" or "exact" where that says it all, else the options. A number of queries stands
        beside it."""
        if self == AttentionScore(self.window) and self.window != "question":
            return "exact" if self.window == "exact" else "window"
        said = {name: value for name, value in asdict(self).items() if name != "window" or isinstance(value, str)}
        return said | ({"blocks": list(self.blocks)} if isinstance(self.blocks, tuple) else {})


def checked_spans(spans: Sequence[Sequence[int]]) -> tuple[Span, ...]:
    """One (start, end) for all rows of a prompt, or one per row; UserError for what is no span."""
    found = tuple(tuple(int(place) for place in span) for span in spans)
    if not found or not all(len(span) == 2 and 0 <= span[0] < span[1] for span in found):
        raise UserError(
            f"the spans of questions are {str(found)[:100]}; each must be a pair (start, end), 0 <= start < end."
        )
    return tuple((start, end) for start, end in found)


def spans_of_rows(spans: Sequence[Span], rows: int) -> tuple[Span, ...]:
    """One span per row: one for all, one each, or one for every group of rows side by side (beams). UserError where
    they do not go together."""
    if not spans:
        raise UserError(
            "the attention score reads each prompt's question: say `with pruner.question([(start, end)]):`."
        )
    if rows % len(spans):
        raise UserError(f"{len(spans)} spans of questions are given for a batch of {rows} rows: give one per row.")
    return tuple(span for span in spans for _ in range(rows // len(spans)))


def check_ends(spans: Sequence[Span], lengths: Sequence[int]) -> None:
    """UserError where a question ends behind its row, which has so many real tokens."""
    for row, ((_, end), length) in enumerate(zip(spans, lengths, strict=True)):
        if end > length:
            raise UserError(f"the question of row {row} ends at token {end}, and its prompt has {length} tokens.")


def _check_blocks(blocks: tuple[int, ...]) -> None:
    """UserError unless these are (first, end) of a range of blocks."""
    if len(blocks) != 2 or not _is_count(blocks[0], 0) or not _is_count(blocks[1], blocks[0] + 1):
        raise UserError(f"blocks is {blocks}, must be latest, max, or (first, end) with 0 <= first < end.")


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
