"""The text that follows a pruned prompt: its logits, and its KL divergence and perplexity against the dense model.

Shapes: B rows of a batch, P prompt tokens, C continuation tokens, V vocabulary, n rows in all. Position t of every
(B, C, ...) result speaks of the token `input_ids[:, P + t]`. In padded batches (see `data.rows.Rows.batch`) positions
of padding mean nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ftp_lightning.costs.request import row_costs
from ftp_lightning.data.rows import Batch, Rows, moved
from ftp_lightning.evaluation.scores import ContinuationScores, Tally
from ftp_lightning.losses import kl_per_token, nll_per_token
from ftp_lightning.pruning.devices import home
from ftp_lightning.pruning.family import cache_argument
from ftp_lightning.pruning.kept import padding_arguments

__all__ = [
    "MODES", "continuation_logits", "evaluate_rows", "kl_per_token", "nll_per_token", "noise_floor", "other_attention",
    "row_means", "sequence_logits", "teacher_logprobs",
]  # fmt: skip

MODES = ("prompt", "sequence")


def continuation_logits(model, input_ids: Tensor, prompt_tokens: int, attention_mask: Tensor | None = None) -> Tensor:
    """Logits of the continuation in the deployed computation: prompt prefilled, then the rest scored through its cache.

    `logits[:, t]` predicts `input_ids[:, P + t]`: the prompt's last logit comes first, the continuation but its last
    token follows. Where a pruner is attached the prefill is the routed prompt and the rest follows its decode policy
    [ours: method, section 8].

    input_ids: (B, P + C). attention_mask: (B, P + C) of padded rows, prompts on the left, continuations on the right.
    Returns (B, C, V), float32 (float64 of a float64 model). Gradients flow. ValueError unless 1 <= prompt_tokens < P +
    C.
    """
    prompt, continuation = _split(input_ids, prompt_tokens)
    about = padding_arguments(attention_mask, 0, prompt_tokens)
    prefill = model(input_ids=prompt, use_cache=True, logits_to_keep=1, **about)
    logits = [prefill.logits]
    if continuation.shape[1] > 1:
        about = padding_arguments(attention_mask, prompt_tokens, input_ids.shape[1] - 1)
        about |= {cache_argument(model): prefill.past_key_values, "use_cache": True}
        logits.append(model(input_ids=continuation[:, :-1], **about).logits)
    return _at_least_float32(torch.cat(logits, dim=1))


def sequence_logits(model, input_ids: Tensor, prompt_tokens: int, attention_mask: Tensor | None = None) -> Tensor:
    """Logits of the same positions when the whole text is routed in one pass [paper]; not causal, for comparison only.

    Arguments and result as in `continuation_logits`.
    """
    _, continuation = _split(input_ids, prompt_tokens)
    about = padding_arguments(attention_mask) | {"use_cache": False, "logits_to_keep": continuation.shape[1] + 1}
    return _at_least_float32(model(input_ids=input_ids, **about).logits[:, :-1])


def row_means(values: Tensor, scored: Tensor | None) -> Tensor:
    """(B,): the mean of each row of (B, C), over the tokens that `scored` marks."""
    if scored is None:
        return values.mean(dim=1)
    return values.masked_fill(~scored, 0.0).sum(1) / scored.sum(1)


@torch.no_grad()
def teacher_logprobs(model, rows: Rows, batch_size: int = 8) -> list[Tensor]:
    """Log-probabilities of the dense model on each row's continuation, once for all methods compared.

    Returns one tensor (C of the row, V) per row, on the CPU: 4 V bytes per continuation token in float32. The model
    must have no pruner attached.
    """
    found: dict[int, Tensor] = {}
    for numbers, batch in _batches(rows, batch_size, home(model)):
        logprobs = _dense_logprobs(model, batch).cpu()
        found |= {row: one[: rows.shapes[row][1]] for row, one in zip(numbers, logprobs)}
    return [found[row] for row in range(len(rows))]


@torch.no_grad()
def evaluate_rows(
    model,
    rows: Rows,
    pruner=None,
    mode: str = "prompt",
    batch_size: int = 8,
    teacher: Sequence[Tensor] | None = None,
) -> ContinuationScores:
    """Measure a pruner on rows against the same model without it, on the continuation positions.

    Mode "prompt" is the deployed computation, "sequence" the paper's. `teacher`: `teacher_logprobs` of the same rows;
    where it is missing the dense model runs along batch by batch, so that memory stays that of one batch. The pruner is
    attached here and taken away again. ValueError for an unknown mode, no rows, a row without a continuation, or a
    teacher of other rows.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, must be one of {', '.join(MODES)}")
    if teacher is not None and [len(one) for one in teacher] != [continuation for _, continuation in rows.shapes]:
        raise ValueError(f"the teacher has {len(teacher)} rows of other lengths than the {len(rows)} rows to evaluate")
    score = continuation_logits if mode == "prompt" else sequence_logits
    tally = Tally(rows)
    for numbers, batch in _batches(rows, batch_size, home(model)):
        dense = _dense_logprobs(model, batch) if teacher is None else _side_by_side(teacher, numbers, home(model))
        with pruner(model) if pruner is not None else contextlib.nullcontext():
            logits = score(model, **batch)
        tally.add(numbers, dense, logits, _targets(batch))
        if pruner is not None:
            trace = pruner.trace.routed
            tally.add_costs(numbers, trace, row_costs(model, pruner, trace))
    return tally.scores(mode)


@torch.no_grad()
def noise_floor(
    model,
    rows: Rows,
    batch_size: int = 8,
    teacher: Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> ContinuationScores:
    """Dense against dense computed another way: what rounding alone moves, the floor under every KL [ours].

    The other way is another attention kernel (`other_attention`) and one row at a time instead of `batch_size`; `dtype`
    rounds the weights as well. The model is put back afterwards, its weights unharmed. `teacher` as in `evaluate_rows`.
    KL is summed in float64 from distributions normalised in it, so that it cannot be negative.
    """
    tally = Tally(rows)
    for numbers, batch in _batches(rows, batch_size, home(model)):
        dense = _dense_logprobs(model, batch) if teacher is None else _side_by_side(teacher, numbers, home(model))
        alone = [moved(rows.batch([row]), home(model)) for row in numbers]
        with _attention(model, other_attention(model)), _precision(model, dtype):
            logits = [continuation_logits(model, **one) for one in alone]
        for row, kept, again, one in zip(numbers, dense, logits, alone, strict=True):
            kept = kept[None, : again.shape[1]].double().log_softmax(-1)
            tally.add([row], kept, again.double(), _targets(one))
    return tally.scores("prompt")


def other_attention(model) -> str:
    """The attention kernel that the noise floor is measured with: eager, or sdpa where the model is eager itself."""
    return "sdpa" if model.config._attn_implementation == "eager" else "eager"


def _split(input_ids: Tensor, prompt_tokens: int) -> tuple[Tensor, Tensor]:
    if not 1 <= prompt_tokens < input_ids.shape[1]:
        raise ValueError(f"prompt_tokens is {prompt_tokens}, must be in [1, {input_ids.shape[1] - 1}] for this text")
    return input_ids[:, :prompt_tokens], input_ids[:, prompt_tokens:]


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _dense_logprobs(model, batch: Batch) -> Tensor:
    return continuation_logits(model, **batch).log_softmax(dim=-1)


def _side_by_side(teacher: Sequence[Tensor], rows: Sequence[int], device) -> Tensor:
    """(B, C, V) of some rows of a teacher, padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([teacher[row] for row in rows], batch_first=True).to(device)


def _targets(batch: Batch) -> Tensor:
    """(B, C): the tokens of the continuations."""
    return batch["input_ids"][:, batch["prompt_tokens"] :]


def _batches(rows: Rows, batch_size: int, device) -> Iterator[tuple[list[int], Batch]]:
    """Row numbers and batches, on the device."""
    if not len(rows):
        raise ValueError("there are no rows to evaluate")
    if not all(continuation for _, continuation in rows.shapes):
        raise ValueError("a row has no continuation to evaluate; see evaluation.own_answers")
    for numbers, batch in rows.batches(batch_size):
        yield numbers, moved(batch, device)


@contextlib.contextmanager
def _attention(model, kernel: str) -> Iterator[None]:
    """Run with another attention kernel."""
    kept = model.config._attn_implementation
    try:
        model.set_attn_implementation(kernel)
        yield
    finally:
        model.set_attn_implementation(kept)


@contextlib.contextmanager
def _precision(model, dtype: torch.dtype | None) -> Iterator[None]:
    """Run with rounded weights, then put the very same tensors back: a cast to and fro would leave them rounded."""
    if dtype is None:
        yield
        return
    kept = {name: p.data for name, p in model.named_parameters()}
    try:
        for p in model.parameters():
            p.data = p.data.to(dtype)
        yield
    finally:
        for name, p in model.named_parameters():
            p.data = kept[name]
