"""The settings of router training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from ftp_lightning import losses
from ftp_lightning.errors import UserError
from ftp_lightning.training.gates import Gumbel, Soft, StraightThrough

GATES = ("straight-through", "gumbel", "soft")
SCOPES = ("prompt", "sequence")
GUIDES = ("static", "future")
_ONE_OF = {
    "distillation": losses.DISTILLATION, "sparsity_loss": losses.SPARSITY, "guide_decay": losses.DECAYS,
    "gates": GATES, "scope": SCOPES, "guide": GUIDES,
}  # fmt: skip


@dataclass(frozen=True)
class TrainingSettings:
    """How the router is trained; the paper weighs the losses equally and trains at batch 1 on Alpaca. UserError for
    impossible values.

    [ours] `lambda_d` is 20: our L_d is relative to the dense mean square and about a twentieth of the others when
    training starts; with 1 the router stays what the guide made of it. `guide_share` is the share of the steps over
    which the guide loss decays to 0 (the paper does not say). Both were chosen on validation text.

    Args:
        steps: optimiser steps.
        batch_size: rows per forward.
        accumulate: forwards per step, in every process; the loss of a step is the mean over all its rows.
        learning_rate: of Adam, decaying linearly to a twentieth.
        lambda_d, lambda_s, lambda_g: weights of distillation, sparsity and (at the start) guide loss.
        distillation: "mse" of the last hidden state (paper), "kl" of the logits, or "both" added.
        sparsity_loss: "one-sided" (paper) or "symmetric".
        guide: what the guide loss teaches: the decisions of the "static" router (paper), or those that the "future"
            makes: the tokens that the continuation attends to in the dense model [ours], see `training.listening`.
        guide_share, guide_decay, guide_balanced: see `losses.guide_weight` and `losses.guide_loss`.
        gates: see `training.gates`; all are deterministic at evaluation.
        key_gates: under `evict` gradients also go through keys and values, see `training.key_gates`.
        temperature: of "gumbel" gates, at the first step and at the last, geometric between.
        scope: "prompt" (the deployed computation) or "sequence": the whole text is routed and scored (paper).
        recompute: activation checkpointing of the frozen blocks.
        validations: how often at most the router is measured on the validation rows, the last step included and the
            start not; every `validation_interval` steps.
        patience: validations without a lower KL after which to stop; None = never.
        seed: of order, noise and drawn budgets.
    """

    steps: int = 200
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-2
    lambda_d: float = 20.0
    lambda_s: float = 1.0
    lambda_g: float = 1.0
    distillation: str = "mse"
    sparsity_loss: str = "one-sided"
    guide: str = "static"
    guide_share: float = 0.25
    guide_decay: str = "linear"
    guide_balanced: bool = False
    gates: str = "straight-through"
    temperature: tuple[float, float] = (1.0, 0.3)
    key_gates: bool = False
    scope: str = "prompt"
    recompute: bool = False
    validations: int = 5
    patience: int | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "validations", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}, must be at least 1.")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate is {self.learning_rate}, must be positive.")
        if not 0.0 <= self.guide_share <= 1.0:
            raise UserError(f"guide_share is {self.guide_share}, must be in [0, 1].")
        if len(self.temperature) != 2 or min(self.temperature) <= 0:
            raise UserError(f"temperature is {self.temperature}, must be two positive numbers: at first and at last.")
        for name, allowed in _ONE_OF.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(allowed)}.")

    @property
    def validation_interval(self) -> int:
        """Steps from one validation to the next: ceil(steps / validations). The last step is measured in any case."""
        return -(-self.steps // self.validations)

    def gates_at(self, step: int, number: int) -> StraightThrough:
        """The gates of one forward: batch `number` of the whole training, in step `step`."""
        if self.gates == "soft":
            return Soft(keys=self.key_gates)
        if self.gates == "straight-through":
            return StraightThrough(keys=self.key_gates)
        first, last = self.temperature
        reached = step / max(1, self.steps - 1)
        noise = torch.Generator().manual_seed(self.number(f"noise/{number}"))
        return Gumbel(first * (last / first) ** reached, noise, keys=self.key_gates)

    def number(self, purpose: str) -> int:
        """A seed for one purpose, in [0, 2^63)."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()[:8], "big") >> 1
