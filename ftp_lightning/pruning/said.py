"""What the attention of a block says of its keys goes into the table that later routers read.

Shapes: B rows, T new tokens, P routed ones, S keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from ftp_lightning.pruning.cache import RoutedLayer
from ftp_lightning.pruning.kept import Kept, Tokens
from ftp_lightning.pruning.scores import pooled_scores, received_attention, received_by_query
from ftp_lightning.pruning.table import ContinuationTable, PromptTable, remember_prompt

if TYPE_CHECKING:
    from ftp_lightning.pruning.block_run import BlockRun


@torch.no_grad()
def write_scores(run: BlockRun, kept: Kept | None, queries: Tokens, keys: Tokens, layer: RoutedLayer | None) -> None:
    """Write what the attention that just ran says of its keys into the table; nothing where no later router reads it.

    kept: where the queries stand among the new tokens; None = they are all of them.
    """
    tapped, run.tapped = run.tapped, None
    if tapped is None:
        return
    with torch.autocast(tapped.key.device.type, enabled=False):  # ranks must not depend on how the model computes
        if run.forward.routed is None:
            _write_continuation(run, tapped, kept, queries, keys, layer)
        else:
            _write_prompt(run, tapped, kept, queries, keys, layer)


def _write_prompt(run: BlockRun, tapped, kept: Kept | None, queries: Tokens, keys: Tokens, layer) -> None:
    forward, pruner, width = run.forward, run.attached.pruner, run.routed.real.shape[1]
    table = cast(PromptTable, forward.table)
    if forward.training is not None:  # tokens after the routed ones have no say in how these are routed
        tapped.query, tapped.key = tapped.query[:, :, :width], tapped.key[:, :, :width]
        queries, keys = queries.first(width), keys.first(width)
    evicted = kept is not None and pruner.kv[run.index] == "evict"
    new = kept.width if kept is not None and evicted else width
    reads = pruner.router.needs.reads
    if reads is not None:
        scores, seen = reads(tapped, queries, keys, forward.span)
    else:
        score, before = pruner.attention_score, keys.slots.shape[1] - new
        queries = table.asked(queries, None if kept is None else kept.index)
        scores, seen = received_attention(tapped, queries, keys, table.last, before, score.heads)
        scores = pooled_scores(scores, seen, keys, forward.seen, score.pooling, score.kernel_size)
    if layer is not None and pruner.decode != "dense":
        remember_prompt(layer, scores, seen, keys, forward.span)
    index = kept.index if kept is not None and evicted else None
    table.write(scores[:, -new:], seen[:, -new:], index)


def _write_continuation(run: BlockRun, tapped, kept: Kept | None, queries: Tokens, keys: Tokens, layer) -> None:
    score = run.attached.pruner.attention_score
    scores, seen = received_by_query(tapped, queries, keys, score.heads)
    seen = seen & queries.valid[..., None]
    scores = pooled_scores(scores, seen, keys, run.forward.seen, score.pooling, score.kernel_size)
    if kept is not None and not kept.whole:
        tokens = kept.keep.shape[1]
        scores = kept.put(scores.new_zeros(len(scores), tokens, scores.shape[2]), scores)
        seen = kept.put(seen.new_zeros(len(seen), tokens, seen.shape[2]), seen)
    cast(ContinuationTable, run.forward.table).write(layer, scores, seen, keys)


def recall_scores(run: BlockRun, layer: RoutedLayer | None) -> None:
    """What `write_scores` does where no token was computed: a continuation reads what earlier queries said in this
    block."""
    if run.forward.routed is None and run.wants_scores and layer is not None:
        cast(ContinuationTable, run.forward.table).recall(layer)
