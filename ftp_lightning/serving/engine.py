"""One batch of requests through stock `generate`: rows are sampled, stopped and told of each by itself."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.logits_process import TopPLogitsWarper

from ftp_lightning.costs.per_block import BlockCost
from ftp_lightning.costs.request import RowCosts, row_costs
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.devices import home
from ftp_lightning.serving.options import Ask
from ftp_lightning.serving.stops import Text

POLL = 0.1
"""Seconds between two looks at which clients have gone [ours]."""
COLD = 1e-4
"""Temperatures below are greedy [ours]: scores divided by them are no numbers any more."""
Tell = Callable[[str, str, Any], None]
"""(request, "text" or "end", what): how a row tells of itself."""
Gone = Callable[[], Collection[str]]


class Row:
    """One request of a batch.

    Attributes:
        uid: names the request.
        since: `time.monotonic()` when it came.
        why: why it is computed densely, where it is.
        reason: why it ended ("stop", "length", "gone"); empty while it goes on.
    """

    def __init__(self, uid: str, ask: Ask, since: float, tokenizer: Any, why: str = ""):
        self.uid, self.ask, self.since, self.why = uid, ask, since, why
        self.text, self.tokens, self.reason = Text(tokenizer, ask.stop), 0, ""
        self.first: float | None = None

    def add(self, token: int, ends: Collection[int]) -> str:
        """Take a token; the text that may be told now."""
        self.tokens += 1
        self.first = self.first or time.monotonic()
        if token in ends:
            self.reason = "stop"
            return self.text.end()
        piece = self.text.add(token)
        if self.text.stopped:
            self.reason = "stop"
        elif self.tokens >= self.ask.max_tokens:
            piece += self.text.end()
            self.reason = "stop" if self.text.stopped else "length"
        return piece


class Watch(StoppingCriteria):
    """Ends rows: at their own last token, stop string or number of tokens, or because the client has gone."""

    def __init__(self, rows: Sequence[Row], ends: Collection[int], tell: Callable[[Row, str], None], gone: Gone):
        self.rows, self.ends, self.tell, self.gone = rows, ends, tell, gone
        self._looked = time.monotonic()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, token in zip(self.rows, input_ids[:, -1].tolist()):
            if not row.reason:
                self.tell(row, row.add(token, self.ends))
        if time.monotonic() - self._looked > POLL:
            missing, self._looked = self.gone(), time.monotonic()
            for row in self.rows:
                if not row.reason and row.uid in missing:
                    row.reason = "gone"
                    self.tell(row, "")
        return torch.tensor([bool(row.reason) for row in self.rows], device=input_ids.device)


class Sampler(LogitsProcessor):
    """Draws each row's token under its own temperature, top_p and seed, as `generate(do_sample=True)` draws it alone.

    The scores that it gives back leave the drawn token alone, so that a greedy `generate` takes it.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device):
        self.draws = [self._draw(row.ask, device) for row in rows]

    @staticmethod
    def _draw(ask: Ask, device: torch.device) -> Callable[[Tensor], int] | None:
        if ask.temperature < COLD:
            return None
        generator = torch.Generator(device)
        generator.manual_seed(ask.seed) if ask.seed is not None else generator.seed()
        warp = TopPLogitsWarper(ask.top_p) if ask.top_p < 1 else None

        def draw(scores: Tensor) -> int:
            scores = scores / ask.temperature
            scores = scores if warp is None else warp(None, scores)
            return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))

        return draw

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for index, draw in enumerate(self.draws):
            if draw is not None:
                token = draw(scores[index : index + 1])
                scores[index] = -torch.inf
                scores[index, token] = 0.0
        return scores


def answer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    pruner: TokenPruner | None,
    tell: Tell,
    gone: Gone,
    block_costs: list[BlockCost] | None = None,
) -> None:
    """Answer a batch, and tell every row's end as soon as it is there.

    pruner: in force for all rows; None: dense. gone: gives the requests whose clients have gone. block_costs: the
    model's at the pruner's skip rank, if at hand.
    """
    padding = _padding(model)
    ids, mask = padded([row.ask.ids for row in rows], padding, home(model))
    start = time.monotonic()

    @functools.cache
    def costs() -> RowCosts:
        assert pruner is not None  # nobody asks for the costs of a dense batch
        return row_costs(model, pruner, pruner.trace.routed, costs=block_costs)

    def told(row: Row, piece: str) -> None:
        if piece and row.ask.stream and row.reason != "gone":
            tell(row.uid, "text", piece)
        if row.reason:
            tell(row.uid, "end", _end(model, tokenizer, rows, row, pruner, start, costs))

    ends = _ends(model)
    sampler = Sampler(rows, home(model))
    with pruner(model) if pruner is not None else nullcontext(), torch.no_grad():
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(row.ask.max_tokens for row in rows),
            do_sample=False,
            num_beams=1,
            pad_token_id=padding,
            logits_processor=[sampler] if any(sampler.draws) else [],
            stopping_criteria=[Watch(rows, ends, told, gone)],
        )


def padded(rows: Sequence[Sequence[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) ids and mask of prompts of several lengths, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _ends(model: Any) -> set[int]:
    """Tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else set(ends if isinstance(ends, list | tuple) else [ends])


def _padding(model: Any) -> int:
    known = model.generation_config.pad_token_id
    return known if known is not None else min(_ends(model), default=0)


def _end(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    row: Row,
    pruner: TokenPruner | None,
    start: float,
    costs: Callable[[], RowCosts],
) -> dict[str, Any]:
    """What an answer ends with: its text, usage, and what was skipped (`usage`, `ftp` of docs/serve.md)."""
    tokens, index = len(row.ask.ids), rows.index(row)
    prefill = 1e3 * ((row.first or time.monotonic()) - start)
    waited = 1e3 * ((row.first or time.monotonic()) - row.since)
    share, cut = 0.0, 0.0
    if pruner is not None:
        share = float(pruner.trace.routed.row_sparsity[index])
        cut = 1.0 - costs().flops[index] / costs().dense_flops[index]
    ftp: dict[str, Any] = {
        "pruned": pruner is not None,
        "dense_because": row.why or None,
        "budget": None if pruner is None else pruner.scheduled.budget,
        "skipped_share": share,
        "flops_saved": cut,
        "time_to_first_token_ms": round(waited, 3),
        "prefill_ms": round(prefill, 3),
        "prefill_ms_dense_estimate": round(prefill / (1.0 - cut), 3),
        "batch": len(rows),
    }
    if row.ask.trace:
        ftp["tokens"] = _traced(model, tokenizer, row, index, pruner)
    details = {"cached_tokens": 0, "skipped": round(share * tokens), "audio_tokens": 0}
    usage = {
        "prompt_tokens": tokens,
        "completion_tokens": row.tokens,
        "total_tokens": tokens + row.tokens,
        "prompt_tokens_details": details,
    }
    return {"text": row.text.said, "finish_reason": row.reason, "usage": usage, "ftp": ftp}


def _traced(model: Any, tokenizer: Any, row: Row, index: int, pruner: TokenPruner | None) -> list[dict[str, Any]]:
    """Of every prompt token its text and how many blocks computed it."""
    if pruner is None:
        blocks = [model.config.get_text_config().num_hidden_layers] * len(row.ask.ids)
    else:
        keep = torch.stack([one[index] for one in pruner.trace.routed.keep]).sum(0)
        blocks = keep[-len(row.ask.ids) :].tolist()
    return [{"text": tokenizer.decode([token]), "blocks": count} for token, count in zip(row.ask.ids, blocks)]
