"""What a continuation loses against the dense model: the number a search can minimise.

Shapes: B rows, C continuation tokens, V vocabulary, D hidden size, K stored probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ftp_lightning.errors import UserError
from ftp_lightning.losses import nll_per_token

TOP = 128
"""Probabilities of the dense model stored per token [ours]: on the embedded model the 129 numbers give KL to 1e-3."""


@dataclass(frozen=True)
class Criterion:
    """`remember` says what to keep of the dense model's forward, `loss` compares another forward with it."""

    def remember(self, logits: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """logits (B, C, V), hidden (B, C, D) entering the head -> tensors that start with (B, C)."""
        return {}

    def loss(self, teacher: dict[str, Tensor], logits: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
        """(B, C): loss of each continuation token; targets (B, C) are the text's own tokens."""
        raise NotImplementedError(f"{type(self).__name__} does not say what is lost")


@dataclass(frozen=True)
class KLDivergence(Criterion):
    """KL(p || q) = sum_v p_v (log p_v - log q_v) in nats per token, p dense, q pruned.

    Stored are the `top` most probable tokens' log p, in float16 and normalised again when read, and all others as one
    bucket: KL of p and q after the others are put together, hence a divergence still (>= 0, 0 only where they agree),
    and at most the full KL. Where the vocabulary is no larger than `top` there is no bucket.
    """

    top: int = TOP

    def remember(self, logits: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        count = min(self.top, logits.shape[-1])
        logprobs, tokens = logits.log_softmax(-1).topk(count, dim=-1)
        rest = _log_rest(logprobs) if count < logits.shape[-1] else logprobs[..., :0]
        return {"tokens": tokens.to(torch.int32), "logprobs": torch.cat([logprobs, rest], -1).to(torch.float16)}

    def loss(self, teacher: dict[str, Tensor], logits: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
        p = teacher["logprobs"].to(logits.dtype).log_softmax(-1)
        q = logits.log_softmax(-1).gather(-1, teacher["tokens"].to(torch.int64))
        if p.shape[-1] > q.shape[-1]:
            q = torch.cat([q, _log_rest(q)], -1)
        return self.divergence(p, q)

    def divergence(self, p: Tensor, q: Tensor) -> Tensor:
        """(B, C) of log-probabilities p, q (B, C, K + 1)."""
        return (p.exp() * (p - q)).sum(-1)


@dataclass(frozen=True)
class TotalVariation(KLDivergence):
    """sum_v |p_v - q_v| / 2 per token, in [0, 1], of the same buckets as `KLDivergence` [ours].

    The chance that a sampled token differs. KL grows without bound where one token is lost, so that it rather hurts
    many tokens a little; an answer is right or wrong, and this is bounded as it is.
    """

    def divergence(self, p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() - q.exp()).abs().sum(-1) / 2


@dataclass(frozen=True)
class CrossEntropy(Criterion):
    """-log q(token) of the text's own tokens, in nats: what perplexity is made of. Asks nothing of the dense model."""

    def loss(self, teacher: dict[str, Tensor], logits: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
        return nll_per_token(logits, targets)


@dataclass(frozen=True)
class HiddenError(Criterion):
    """|h - h'|^2 / |h|^2 of the state entering the head (after the last norm), h dense, h' pruned; h in float16."""

    def remember(self, logits: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        return {"hidden": hidden.to(torch.float16)}

    def loss(self, teacher: dict[str, Tensor], logits: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
        dense = teacher["hidden"].to(logits.dtype)
        return (hidden.to(logits.dtype) - dense).square().sum(-1) / dense.square().sum(-1)


CRITERIA: dict[str, type[Criterion]] = {
    "kl": KLDivergence,
    "tv": TotalVariation,
    "ce": CrossEntropy,
    "mse": HiddenError,
}


def _log_rest(logprobs: Tensor) -> Tensor:
    """log(1 - sum exp(logprobs)) (..., 1), kept finite where next to nothing is left."""
    left = 1.0 - logprobs.double().exp().sum(-1, keepdim=True)
    return left.clamp(min=1e-7).log().to(logprobs.dtype)


@contextmanager
def entering_head(model: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden states that enter the model's head, one tensor (B, tokens, D) per forward inside.

    UserError where the model tells no head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{type(model).__name__} names no output embeddings\nSearch with another --criterion than mse.")
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
