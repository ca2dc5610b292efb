"""lm-eval's log-likelihood requests as token ids, and how they go into batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.harness.answers import request_key
from ftp_lightning.evaluation.scoring import even_batches


class Item:
    """A request cut to the model's length from the left, as lm-eval does: the last `limit` + 1 tokens of both."""

    def __init__(
        self, request: tuple[str, str] | None, context: Iterable[int], continuation: Iterable[int], limit: int
    ):
        context, self.request, self.continuation = tuple(context), request, tuple(continuation)
        if not context or not 1 <= len(self.continuation) <= limit:
            raise UserError(
                f"a continuation has {len(self.continuation)} tokens after a context of {len(context)}, the model takes"
                f" {limit}\nrequest: {str(request)[:80]}"
            )
        self.context = context[max(0, len(context) + len(self.continuation) - limit - 1) :]
        self.truncated = len(context) - len(self.context)
        self.length = len(self.context) + len(self.continuation)
        self.key = request_key("loglikelihood", self.context, self.continuation)


def context_batches(items: list[Item], size: int) -> Iterator[list[list[int]]]:
    """Batches of distinct contexts, of one length where possible: each context as the list of the items it has."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(tuple(item.context), []).append(i)
    order = sorted(groups, key=lambda context: (-len(context), context))
    return ([groups[tuple(context)] for context in batch] for batch in even_batches(order, size))


def text_batches(items: list[Item], size: int) -> Iterator[list[list[int]]]:
    """Batches of whole texts, longest first."""
    order = sorted(range(len(items)), key=lambda i: -items[i].length)
    return ([[i] for i in order[start : start + size]] for start in range(0, len(order), size))
