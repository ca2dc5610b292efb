"""The router's losses (paper, Section 4.3), one pure function per equation.

    L = lambda_d L_d + lambda_s L_s + lambda_g(t) L_g

The paper weighs them equally and does not print formulas for all; what is ours is marked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L_d = mean |student - teacher|^2 / mean |teacher|^2 over the positions given [ours: relative, so that lambda_d
    means the same for every model]. student, teacher (..., D): last hidden states of the pruned and the dense model. A
    float32 scalar
    >= 0."""
    student, teacher = student.float(), teacher.float()
    return F.mse_loss(student, teacher) / teacher.pow(2).mean().clamp(min=1e-12)


def soft_sparsity(probability: Tensor, real: Tensor, reserved: Tensor) -> Tensor:
    """s_hat = 1 - mean of p_compute over the real, non-reserved tokens of the routed part [ours: soft, whatever the
    choice is].

    probability (B, P) in [0, 1]; real, reserved (B, P) bool. 0 where no token is free.
    """
    free = (real & ~reserved).to(probability.dtype)
    return ((1.0 - probability) * free).sum() / free.sum().clamp(min=1.0)


def sparsity_loss(target: Sequence[float], realised: Sequence[Tensor]) -> Tensor:
    """L_s = sum over blocks of max(s_l - s_hat_l, 0): penalises only under-pruning (paper). target, realised: one per
    block."""
    short = [torch.clamp(s - s_hat, min=0.0) for s, s_hat in zip(target, realised, strict=True)]
    return torch.stack(short).sum()


def guide_loss(probability: Tensor, decision: Tensor, real: Tensor) -> Tensor:
    """L_g = binary cross-entropy between p_compute and the static router's decision, over the real tokens.

    probability (B, P) in [0, 1]; decision (B, P) 0/1; real (B, P) bool.
    """
    probability = probability.clamp(1e-6, 1.0 - 1e-6)
    per_token = F.binary_cross_entropy(probability, decision.to(probability.dtype), reduction="none")
    weight = real.to(per_token.dtype)
    return (per_token * weight).sum() / weight.sum().clamp(min=1.0)


def guide_weight(lambda_g: float, step: int, total_steps: int, share: float) -> float:
    """lambda_g(t) = lambda_g max(0, 1 - t / (share * total)): linear to 0 over a share of training [ours: the paper
    only says it decays]. A share of 0 switches the guide off."""
    horizon = share * total_steps
    return lambda_g * max(0.0, 1.0 - step / horizon) if horizon > 0 else 0.0
