"""lm-eval's generate_until with lengths from the requests, one generation per distinct request, and accounts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.harness.accounts import Answer, realised_rows
from ftp_lightning.evaluation.harness.answers import request_key
from ftp_lightning.evaluation.scoring import pad_rows


@dataclass
class Job:
    """A context to go on from, and the requests that want just that."""

    context: tuple[int, ...]
    truncated: int
    options: Mapping[str, Any]
    places: list[int] = field(default_factory=list)

    @property
    def key(self) -> str:
        return request_key("generate", self.context, self.options)


def jobs_of(lm, requests: Sequence) -> list[Job]:
    """Distinct (context, options), longest context first; what is sampled is drawn anew for every request.

    Contexts are cut from the left, as lm-eval does, so that the new tokens fit the model; UserError where these alone
    do not.
    """
    jobs: dict[Any, Job] = {}
    for place, request in enumerate(requests):
        text, options = request.args[:2]
        own = place if options.get("do_sample") else None
        job = jobs.get(named := (text, json.dumps(options, sort_keys=True, default=str), own))
        if job is None:
            job = jobs[named] = Job(*_context(lm, text, options), options)
        job.places.append(place)
    return sorted(jobs.values(), key=lambda job: -len(job.context))


def _context(lm, text: str, options: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """The context's tokens that fit, and how many did not."""
    room = lm.max_length - _new_tokens(lm, options)
    if room < 1:
        raise UserError(
            f"{_new_tokens(lm, options)} tokens are to be generated, the model takes {lm.max_length} in all\n"
            "Give the task a smaller max_gen_toks, or take a model with a longer window."
        )
    tokens = lm.tok_encode(text) or [lm.prefix_token_id]
    return tuple(tokens[-room:]), max(0, len(tokens) - room)


def _new_tokens(lm, options: Mapping[str, Any]) -> int:
    return normalize_gen_kwargs(dict(options), lm.max_gen_toks)["max_gen_toks"]


def job_batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """At most `size` jobs of the same options."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(json.dumps(job.options, sort_keys=True, default=str), []).append(job)
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))


def generate(lm, batch: Sequence[Job]) -> list[Answer]:
    """Texts that go on from the contexts of one batch, in its order; cut at the task's stop sequences."""
    options = normalize_gen_kwargs(dict(batch[0].options), lm.max_gen_toks)
    stop = handle_stop_sequences(options.pop("until", None), eos=lm.tok_decode(lm.eot_token_id, False))
    new_tokens = options.pop("max_gen_toks")
    options.pop("max_length", None)
    ids, mask = pad_rows([job.context for job in batch], "left", lm.device)
    length = ids.shape[1] + new_tokens
    rows = lm._model_generate(context=ids, attention_mask=mask, stop=stop, max_length=length, **options)
    rows = rows[:, ids.shape[1] :].tolist()
    realised = realised_rows(lm.model, lm.pruner, [[_answer_tokens(lm, row, stop)] for row in rows])
    return [
        Answer(_text(lm, row, stop), prompt.sparsity, None, prompt.spent[0])
        for row, prompt in zip(rows, realised, strict=True)
    ]


def _answer_tokens(lm, tokens: list[int], stop: list[str]) -> int:
    """Tokens up to the first that ends the answer; what a batch computes after that belongs to its longer rows."""
    known = lm.model.generation_config.eos_token_id
    ends = {lm.eot_token_id, *(known if isinstance(known, list) else [known])}
    length = next((place for place, token in enumerate(tokens, 1) if token in ends), len(tokens))
    texts = ((place, lm.tok_decode(tokens[:place])) for place in range(1, length + 1))
    return next((place for place, text in texts if any(sequence in text for sequence in stop)), length)


def _text(lm, tokens: list[int], stop: list[str]) -> str:
    """What was generated, without its thinking, up to the first stop sequence; as HFLM does it."""
    end, as_text = lm.think_end_token, isinstance(lm.think_end_token, str)
    if isinstance(end, int) and end in tokens:
        tokens = tokens[len(tokens) - tokens[::-1].index(end) :]
    text = lm.tok_decode(tokens)
    return postprocess_generated_text(text.lstrip() if isinstance(end, int) else text, stop, end if as_text else None)
