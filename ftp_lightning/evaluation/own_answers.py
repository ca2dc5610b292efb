"""Own answers: prompts, each continued by what the dense model itself answers greedily.

They need no labels, and ask what a user cares about: does the pruned model still say what the dense one said?
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ftp_lightning.data.rows import Batch, Rows, moved
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.harness.accounts import Answer
from ftp_lightning.evaluation.harness.answers import AnswerBook, request_key
from ftp_lightning.fingerprint import digest
from ftp_lightning.lock import locked
from ftp_lightning.models import model_identity
from ftp_lightning.pruning.devices import home
from ftp_lightning.pruning.family import cache_argument
from ftp_lightning.pruning.kept import padding_arguments
from ftp_lightning.sharding import is_sharded

BATCH = 8
EMPTY = "empty_answer"


def own_answers(
    model,
    prompts: Rows,
    new_tokens: int,
    folder: str | Path | None = None,
    only_missing: bool = False,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Rows:
    """The prompts with the dense model's greedy answers of at most `new_tokens` tokens as continuations.

    An end token ends an answer and is its last token. A prompt that is answered by the end token alone is left out and
    counted as "empty_answer". Answers are kept in `folder` batch by batch, by a hash of the model and its precision,
    the prompt and `new_tokens`, so that the same call goes on after a kill. Processes that share the folder make each
    answer once.

    Args:
        model: a Hugging Face causal LM with nothing attached.
        prompts: rows whose continuations are replaced; with `only_missing` those that have one keep it.
        folder: None keeps nothing.
        tell: is told before each batch how many answers are there, and of how many.

    Raises UserError where a prompt and its answer do not fit the model, or all answers are empty; ValueError without
    prompts, or for answers of no tokens.
    """
    if not len(prompts) or new_tokens < 1:
        raise ValueError(f"{len(prompts)} prompts and {new_tokens} new tokens: each must be at least 1")
    asked = [i for i, row in enumerate(prompts.rows) if not (only_missing and row.continuation)]
    _check_positions(model, prompts.subset(asked).prompt_tokens + new_tokens)
    ends = end_tokens(model)
    found = _answers(model, prompts.subset(asked).prompts(), new_tokens, folder, tell)
    answers = dict(zip(asked, found, strict=True))
    empty = {i for i, answer in answers.items() if answer[:1] and answer[0] in ends}
    if len(empty) == len(prompts):
        raise UserError(
            f"the model answers none of the {len(prompts)} prompts: it ends each at once\n"
            "Give other prompts, or end them as the model expects it (a chat template)."
        )
    rows = [
        replace(row, continuation=answers.get(i, row.continuation))
        for i, row in enumerate(prompts.rows)
        if i not in empty
    ]
    return Rows(rows, {**prompts.left_out, EMPTY: len(empty)}, prompts.cut)


def end_tokens(model) -> frozenset[int]:
    """The token ids that end an answer of this model."""
    ends = [getattr(part, "eos_token_id", None) for part in (model.generation_config, model.config.get_text_config())]
    first: int | list[int] = next((end for end in ends if end is not None), [])
    return frozenset(first if isinstance(first, list) else [first])


def unanswered(model, prompts: Rows, new_tokens: int, folder: str | Path) -> list[bool]:
    """For each prompt, whether `own_answers` would ask the model."""
    keys = [request_key(row.prompt) for row in prompts.rows]
    known = _known(AnswerBook(folder, _identity(model, new_tokens)), keys)
    return [key not in known for key in keys]


def _identity(model, new_tokens: int) -> str:
    """Of all that decides an answer but the prompt."""
    ends = sorted(end_tokens(model))
    who = {"model": model_identity(model), "dtype": str(model.dtype), "ends": ends, "new_tokens": new_tokens}
    return digest(json.dumps(who, sort_keys=True).encode())


def _answers(
    model, prompts: Rows, new_tokens: int, folder: str | Path | None, tell: Callable[[int, int], None]
) -> list[list[int]]:
    """The answer to each prompt, from the folder or from the model.

    Of several processes that want the same, one asks the model and the others wait, telling so, and read. A sharded
    model is asked by all at once.
    """
    identity, ends = _identity(model, new_tokens), end_tokens(model)
    keys = [request_key(row.prompt) for row in prompts.rows]
    known = _known(AnswerBook(folder, identity), keys)
    if len(known) == len(set(keys)):
        return [known[key] for key in keys]
    place = None if folder is None or is_sharded(model) else Path(folder).expanduser() / identity
    with nullcontext() if place is None else locked(place, lambda: tell(len(known), len(prompts))):
        book = AnswerBook(folder, identity)
        known = _known(book, keys)
        first = {key: i for i, key in enumerate(keys) if key not in known}
        missing = prompts.subset(first.values())
        for done, (numbers, batch) in enumerate(missing.batches(BATCH)):
            tell(len(prompts) - len(missing) + done * BATCH, len(prompts))
            found = dict(zip((list(first)[i] for i in numbers), greedy(model, batch, new_tokens, ends)))
            book.add({key: Answer(tuple(answer)) for key, answer in found.items()})
            known |= found
    return [known[key] for key in keys]


def _known(book: AnswerBook, keys: list[str]) -> dict[str, list[int]]:
    return {key: list(answer.value) for key in keys if (answer := book.get(key)) is not None}


@torch.no_grad()
def greedy(model, batch: Batch, new_tokens: int, ends: frozenset[int]) -> list[list[int]]:
    """What the model as it is says after each prompt: the most probable token again and again, up to an end token."""
    batch = moved(batch, home(model))
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    lengths = ids.new_full((len(ids), 1), ids.shape[1]) if mask is None else mask.sum(1, keepdim=True)
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **padding_arguments(mask))
    said: list[Tensor] = []
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    stops = torch.tensor(sorted(ends), device=ids.device, dtype=torch.int64)
    while True:
        token = out.logits[:, -1].argmax(-1)
        said.append(token)
        ended |= torch.isin(token, stops)
        if len(said) == new_tokens or ended.all():
            break
        about = {} if mask is None else {"position_ids": lengths + len(said) - 1}
        if mask is not None:
            about["attention_mask"] = mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        cache = {cache_argument(model): out.past_key_values}
        out = model(input_ids=token[:, None], use_cache=True, **cache, **about)
    return [_up_to_end(row, ends) for row in torch.stack(said, 1).tolist()]


def _up_to_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]


def _check_positions(model, wanted: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and wanted > limit:
        raise UserError(
            f"the longest prompt and its answer have {wanted} tokens, the model takes {limit}\n"
            "Give fewer --prompt_tokens or --continuation_tokens."
        )
