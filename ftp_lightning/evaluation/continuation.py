"""The text that follows a pruned prompt: its logits, and its KL divergence and perplexity against the dense model.

Shapes: B rows, P prompt tokens, C continuation tokens, V vocabulary, n windows. Position t of every (B, C, ...) result
speaks of the token `input_ids[:, P + t]`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ftp_lightning.losses import kl_per_token
from ftp_lightning.pruning.places import home

MODES = ("prompt", "sequence")


def continuation_logits(model, input_ids: Tensor, prompt_tokens: int) -> Tensor:
    """Logits of the continuation in the deployed computation: prompt prefilled, then the rest scored through its cache.

    `logits[:, t]` predicts `input_ids[:, P + t]`: the prompt's last logit comes first, the continuation but its last
    token follows. Where a pruner is attached the prefill is the routed prompt and the rest follows its decode policy
    [ours: method, section 8].

    input_ids: (B, P + C) without padding. Returns (B, C, V), float32 (float64 of a float64 model). Gradients flow.
    ValueError unless 1 <= prompt_tokens < P + C.
    """
    prompt, continuation = _split(input_ids, prompt_tokens)
    prefill = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    logits = [prefill.logits]
    if continuation.shape[1] > 1:
        cache = prefill.past_key_values
        logits.append(model(input_ids=continuation[:, :-1], past_key_values=cache, use_cache=True).logits)
    return _at_least_float32(torch.cat(logits, dim=1))


def sequence_logits(model, input_ids: Tensor, prompt_tokens: int) -> Tensor:
    """Logits of the same positions when the whole text is routed in one pass [paper]; not causal, for comparison only.

    input_ids: (B, P + C) without padding. Returns (B, C, V). ValueError unless 1 <= prompt_tokens < P + C.
    """
    _, continuation = _split(input_ids, prompt_tokens)
    logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=continuation.shape[1] + 1).logits
    return _at_least_float32(logits[:, :-1])


def nll_per_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood -log softmax(logits)[target] of each token, in nats; (B, C, V), (B, C) -> (B, C)."""
    return logits.logsumexp(dim=-1) - logits.gather(-1, targets[..., None]).squeeze(-1)


@dataclass(frozen=True)
class ContinuationScores:
    """What the continuation lost: KL in nats per token, PPL(P,C) = exp(mean nll), and the sparsity that was realised.

    The lists hold one mean per window, in the order of the windows: differences of two methods on them go to
    `clustered`. `sparsity` holds one realised share per block over the prompt (mode "sequence": over the text);
    empty for the dense model.
    """

    mode: str
    prompt_tokens: int
    continuation_tokens: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    ppl: float
    dense_ppl: float
    kl_rows: list[float] = field(repr=False)
    nll_rows: list[float] = field(repr=False)
    dense_nll_rows: list[float] = field(repr=False)
    sparsity: list[float]

    @property
    def mean_sparsity(self) -> float:
        """Realised sparsity averaged over blocks; 0 for the dense model."""
        return sum(self.sparsity) / len(self.sparsity) if self.sparsity else 0.0


@torch.no_grad()
def teacher_logprobs(model, windows, batch_size: int = 8) -> Tensor:
    """Log-probabilities of the dense model on the continuations, once for all methods compared; (n, C, V) on the CPU.

    The model must have no pruner attached. 4 n C V bytes in float32.
    """
    batches = _batches(windows, batch_size, home(model))
    return torch.cat([_dense_logprobs(model, ids, windows.prompt_tokens).cpu() for _, ids in batches])


@torch.no_grad()
def evaluate_windows(
    model, windows, pruner=None, mode: str = "prompt", batch_size: int = 8, teacher: Tensor | None = None
) -> ContinuationScores:
    """Measure a pruner on windows of text against the same model without it, on the continuation positions.

    Mode "prompt" is the deployed computation, "sequence" the paper's. `teacher`: `teacher_logprobs` of the same
    windows; where it is missing the dense model runs along batch by batch, so that memory stays that of one batch. The
    pruner is attached here and taken away again. ValueError for an unknown mode, no windows, or a teacher of other
    windows.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, must be one of {', '.join(MODES)}")
    if teacher is not None and teacher.shape[:2] != (len(windows.input_ids), _continuation_tokens(windows)):
        raise ValueError(f"teacher has shape {tuple(teacher.shape)}, the windows are {tuple(windows.input_ids.shape)}")
    score = continuation_logits if mode == "prompt" else sequence_logits
    tally = _Tally()
    for rows, ids in _batches(windows, batch_size, home(model)):
        dense = _dense_logprobs(model, ids, windows.prompt_tokens) if teacher is None else teacher[rows].to(ids.device)
        with pruner(model) if pruner is not None else contextlib.nullcontext():
            logits = score(model, ids, windows.prompt_tokens)
        tally.add(dense, logits, ids[:, windows.prompt_tokens :])
        if pruner is not None:
            tally.add_sparsity(pruner.trace.prompt.sparsity, rows=len(ids))
    return tally.scores(mode, windows.prompt_tokens, _continuation_tokens(windows))


@torch.no_grad()
def noise_floor(
    model, windows, batch_size: int = 8, teacher: Tensor | None = None, dtype: torch.dtype | None = None
) -> ContinuationScores:
    """Dense against dense computed another way: what rounding alone moves, the floor under every KL [ours].

    The other way is another attention kernel (`other_attention`) and one window at a time instead of `batch_size`;
    `dtype` rounds the weights as well. The model is put back afterwards, its weights unharmed. `teacher` as in
    `evaluate_windows`. KL is summed in float64 from distributions normalised in it, so that it cannot be negative.
    """
    tally = _Tally()
    for rows, ids in _batches(windows, batch_size, home(model)):
        dense = _dense_logprobs(model, ids, windows.prompt_tokens) if teacher is None else teacher[rows].to(ids.device)
        with _attention(model, other_attention(model)), _precision(model, dtype):
            logits = [continuation_logits(model, row[None], windows.prompt_tokens) for row in ids]
        for row, alone, again in zip(ids, dense, logits, strict=True):
            tally.add(alone[None].double().log_softmax(-1), again.double(), row[None, windows.prompt_tokens :])
    return tally.scores("prompt", windows.prompt_tokens, _continuation_tokens(windows))


def other_attention(model) -> str:
    """The attention kernel that the noise floor is measured with: eager, or sdpa where the model is eager itself."""
    return "sdpa" if model.config._attn_implementation == "eager" else "eager"


class _Tally:
    """Per-token measures gathered batch by batch."""

    def __init__(self):
        self.kl, self.nll, self.dense_nll, self.agree = [], [], [], []
        self.skipped, self.rows = [], 0

    def add(self, dense: Tensor, logits: Tensor, targets: Tensor) -> None:
        self.kl.append(kl_per_token(dense, logits).cpu())
        self.nll.append(nll_per_token(logits, targets).cpu())
        self.dense_nll.append(nll_per_token(dense, targets).cpu())
        self.agree.append((dense.argmax(-1) == logits.argmax(-1)).cpu())

    def add_sparsity(self, sparsity: list[float], rows: int) -> None:
        """Realised sparsity per block; windows are equally long, so a batch weighs as much as its rows."""
        self.rows += rows
        self.skipped = [
            total + rows * s for total, s in zip(self.skipped or [0.0] * len(sparsity), sparsity, strict=True)
        ]

    def scores(self, mode: str, prompt_tokens: int, continuation_tokens: int) -> ContinuationScores:
        kl, nll, dense_nll = (torch.cat(part).double() for part in (self.kl, self.nll, self.dense_nll))
        return ContinuationScores(
            mode=mode,
            prompt_tokens=prompt_tokens,
            continuation_tokens=continuation_tokens,
            kl_mean=kl.mean().item(),
            kl_p99=kl.flatten().quantile(0.99).item(),
            top1_agreement=torch.cat(self.agree).double().mean().item(),
            ppl=math.exp(nll.mean()),
            dense_ppl=math.exp(dense_nll.mean()),
            kl_rows=kl.mean(dim=1).tolist(),
            nll_rows=nll.mean(dim=1).tolist(),
            dense_nll_rows=dense_nll.mean(dim=1).tolist(),
            sparsity=[total / self.rows for total in self.skipped],
        )


def _split(input_ids: Tensor, prompt_tokens: int) -> tuple[Tensor, Tensor]:
    if not 1 <= prompt_tokens < input_ids.shape[1]:
        raise ValueError(f"prompt_tokens is {prompt_tokens}, must be in [1, {input_ids.shape[1] - 1}] for this text")
    return input_ids[:, :prompt_tokens], input_ids[:, prompt_tokens:]


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _dense_logprobs(model, input_ids: Tensor, prompt_tokens: int) -> Tensor:
    return continuation_logits(model, input_ids, prompt_tokens).log_softmax(dim=-1)


def _continuation_tokens(windows) -> int:
    return windows.input_ids.shape[1] - windows.prompt_tokens


def _batches(windows, batch_size: int, device) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges of the windows and their tokens on the device."""
    if len(windows.input_ids) == 0:
        raise ValueError("there are no windows to evaluate")
    for start in range(0, len(windows.input_ids), batch_size):
        rows = slice(start, start + batch_size)
        yield rows, windows.input_ids[rows].to(device)


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
