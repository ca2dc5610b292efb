"""Several pruners on the same prompts: the dense model answers each once, and every pruner starts from its states.

An answer is kept where the pruned model prefers the dense model's token at every place, which is what greedy decoding
does. Where it differs, the answer is decoded anew. [ours]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ftp_lightning.costs.request import row_costs
from ftp_lightning.data.rows import Row, Rows
from ftp_lightning.evaluation.continuation import continuation_logits
from ftp_lightning.evaluation.own_answers import end_tokens, greedy
from ftp_lightning.losses import kl_rows
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.devices import home
from ftp_lightning.schedule import first_routed
from ftp_lightning.training.resume import BlockStates, capture, first_needed_block, resume_from


@dataclass(frozen=True)
class Question:
    """One prompt to answer.

    Attributes:
        ids: its tokens.
        document: what it was made from.
        new_tokens: the longest answer.
        gold: an answer, which ends with its first line, is right where it holds one of these; without any, where it is
            the dense model's own to the last token.
        alone: tokens of the same question without its passage; None where it cannot be asked so.
    """

    ids: tuple[int, ...]
    document: str
    new_tokens: int
    gold: tuple[str, ...] = ()
    alone: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Answered:
    """What the dense model does with a question: its answer, the states between its blocks, and its logits (1, C, V).

    Memory: (N + 1) (P + C) D + C V numbers.
    """

    question: Question
    answer: tuple[int, ...]
    states: BlockStates
    logits: Tensor
    right: bool
    needed: bool


@torch.no_grad()
def answered(model, tokenizer, question: Question) -> Answered:
    """Let the dense model answer greedily, and keep what it computes on the way. Nothing may be attached."""
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, args, out: seen.append(out.logits[:, -1:].float()))
    try:
        with capture(model) as states:
            answer = _said(model, tokenizer, question, question.ids)
    finally:
        handle.remove()
    right = not question.gold or _holds(tokenizer, answer, question.gold)
    needed = right
    if right and question.gold and question.alone is not None:
        needed = not _holds(tokenizer, _said(model, tokenizer, question, question.alone), question.gold)
    return Answered(question, tuple(answer), states, torch.cat(seen, 1)[:, : len(answer)], right, needed)


@torch.no_grad()
def replayed(model, tokenizer, dense: Answered, pruner: TokenPruner) -> Mapping[str, Any]:
    """One item of a record: what the pruner makes of a question, computed from its first pruned block upward."""
    question, answer = dense.question, dense.answer
    ids = torch.tensor([[*question.ids, *answer]], device=home(model))
    routed = first_routed(pruner.scheduled.sparsity) or 0
    first = first_needed_block(model, routed, pruner.router.needs, pruner.reads_from)
    states = BlockStates([[] for _ in dense.states.passes])
    states.passes[first] = [dense.states.entering(first)]
    with resume_from(model, first, states), pruner(model):
        logits = continuation_logits(model, ids, len(question.ids))
        trace = pruner.trace.routed
        costs = row_costs(model, pruner, trace)
    same = (logits.argmax(-1) == ids[:, len(question.ids) :])[0]
    agreed = bool(same.all())
    right = agreed and dense.right
    if question.gold and dense.right and not agreed:
        with pruner(model):
            right = _holds(tokenizer, _said(model, tokenizer, question, question.ids), question.gold)
    return {
        "document": question.document,
        "prompt_tokens": len(question.ids),
        "continuation_tokens": len(answer),
        "right": right,
        "needed": dense.needed,
        "agreed": agreed,
        "first": bool(same[0]),
        "share": same.float().mean().item(),
        "kl": kl_rows(logits, dense.logits)[0].item(),
        "sparsity": trace.row_sparsity[0].item(),
        "flops": costs.flops[0],
        "dense_flops": costs.dense_flops[0],
    }


def _said(model, tokenizer, question: Question, ids: tuple[int, ...]) -> list[int]:
    """What the model as it is says after `ids`."""
    batch = Rows([Row(list(ids), [])]).batch([0])
    ends = end_tokens(model) | (line_ends(tokenizer) if question.gold else frozenset())
    return greedy(model, batch, question.new_tokens, ends)[0]


@cache
def line_ends(tokenizer) -> frozenset[int]:
    """The tokens that end a line: those with a line feed, which byte-level vocabularies write as "Ċ"."""
    return frozenset(number for word, number in tokenizer.get_vocab().items() if "\n" in word or "Ċ" in word)


def _holds(tokenizer, tokens, gold: tuple[str, ...]) -> bool:
    said = tokenizer.decode(list(tokens), skip_special_tokens=True).lower()
    return any(one.lower() in said for one in gold)
