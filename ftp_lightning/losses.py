"""The router's losses (paper, Section 4.3), one pure function per equation.

    L = lambda_d L_d + lambda_s L_s + lambda_g(t) L_g

Every term is taken per row and averaged over the rows [ours]: the paper trains at batch 1, and so a batch is the mean
of that many of its steps, whether its rows come in one forward, are accumulated or lie in several processes. The paper
weighs the terms equally and does not print formulas for all; what is ours is marked.

Shapes: B rows, C scored tokens, P routed tokens, D hidden size, V vocabulary. `scored` (B, C) bool marks the real ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DISTILLATION = ("mse", "kl", "both")
SPARSITY = ("one-sided", "symmetric")
DECAYS = ("linear", "cosine", "constant")


def distillation_loss(student: Tensor, teacher: Tensor, scored: Tensor | None = None) -> Tensor:
    """L_d = mean over rows of |student - teacher|^2 / |teacher|^2, both summed over a row's scored tokens [ours:
    relative, so that lambda_d means the same for every model].

    student, teacher (B, C, D): last hidden states of the pruned and the dense model. A float32 scalar >= 0; rows
    without a scored token count as 0.
    """
    student, teacher = student.float(), teacher.float()
    error, scale = (student - teacher).square().sum(-1), teacher.square().sum(-1)
    if scored is not None:
        error, scale = error * scored, scale * scored
    return (error.sum(1) / scale.sum(1).clamp(min=1e-12)).mean()


def kl_per_token(teacher_logprobs: Tensor, logits: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) of each token, in nats; p the teacher, q = softmax(logits).

    teacher_logprobs, logits: (B, C, V). Returns (B, C).
    """
    difference = teacher_logprobs - logits.log_softmax(dim=-1)
    return (teacher_logprobs.exp() * difference).sum(dim=-1)


def nll_per_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood -log softmax(logits)[target] of each token, in nats; (B, C, V), (B, C) -> (B, C)."""
    return logits.logsumexp(dim=-1) - logits.gather(-1, targets[..., None]).squeeze(-1)


def kl_rows(student: Tensor, teacher: Tensor, scored: Tensor | None = None) -> Tensor:
    """Mean KL(teacher || student) of each row's scored tokens, in nats [ours: an option of L_d, its mean over rows].

    student, teacher (B, C, V): logits. Returns (B,) float32 (float64 of float64 logits) >= 0; 0 for a row without a
    scored token.
    """
    if student.dtype != torch.float64:
        student, teacher = student.float(), teacher.float()
    divergence = kl_per_token(teacher.log_softmax(-1), student)
    return _per_row(divergence, torch.ones_like(divergence) if scored is None else scored.to(divergence.dtype))


def soft_sparsity(probability: Tensor, real: Tensor, reserved: Tensor) -> Tensor:
    """s_hat = 1 - mean of p_compute over a row's real, non-reserved tokens of the routed part [ours: soft, whatever the
    choice is].

    probability (B, P) in [0, 1]; real, reserved (B, P) bool. Returns (B,); 0 for a row in which no token is free.
    """
    return _per_row(1.0 - probability, (real & ~reserved).to(probability.dtype))


def sparsity_loss(target: Sequence[float], realised: Sequence[Tensor], kind: str = "one-sided") -> Tensor:
    """L_s = mean over rows of sum over blocks of max(s_l - s_hat_l, 0): penalises only under-pruning (paper); with
    "symmetric" |s_l - s_hat_l| [ours].

    target: s_l of each block; realised: s_hat_l (B,) of each.
    """
    short = torch.stack([s - s_hat for s, s_hat in zip(target, realised, strict=True)])
    return (short.abs() if kind == "symmetric" else short.clamp(min=0.0)).sum(0).mean()


def guide_loss(probability: Tensor, decision: Tensor, real: Tensor, balanced: bool = False) -> Tensor:
    """L_g = mean over rows of the binary cross-entropy between p_compute and the static router's decision, over a row's
    real tokens.

    probability (B, P) in [0, 1]; decision (B, P) 0/1; real (B, P) bool. balanced [ours]: the tokens to compute and
    those to skip weigh one half each, however few there are of one of them.
    """
    probability = probability.clamp(1e-6, 1.0 - 1e-6)
    per_token = F.binary_cross_entropy(probability, decision.to(probability.dtype), reduction="none")
    weight = real.to(per_token.dtype)
    if not balanced:
        return _per_row(per_token, weight).mean()
    classes = [_per_row(per_token, weight * of) for of in (decision > 0.5, decision <= 0.5)]
    return torch.stack(classes).mean()


def guide_weight(lambda_g: float, step: int, total_steps: int, share: float, decay: str = "linear") -> float:
    """lambda_g(t), from lambda_g to 0 over a share of training [ours: the paper only says that it decays].

    With x = t / (share * total), at most 1: linear 1 - x; cosine (1 + cos(pi x)) / 2; constant 1 up to x = 1, then 0. A
    share of 0 switches the guide off.
    """
    horizon = share * total_steps
    if horizon <= 0 or step >= horizon:
        return 0.0
    x = step / horizon
    return lambda_g * {"linear": 1.0 - x, "cosine": 0.5 * (1.0 + math.cos(math.pi * x)), "constant": 1.0}[decay]


def _per_row(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of each row, (B, n) -> (B,); 0 where nothing weighs."""
    return (values * weight).sum(1) / weight.sum(1).clamp(min=1.0)
