"""Router training: a frozen model, a router of a few hundred parameters, three losses. A thin system; formulas are in
`losses`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

from ftp_lightning.data.module import WindowsData
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.continuation import continuation_logits, kl_per_token
from ftp_lightning.losses import distillation_loss, guide_loss, guide_weight, soft_sparsity, sparsity_loss
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.blocks import find_decoder
from ftp_lightning.routing import StaticRouter


@dataclass(frozen=True)
class TrainingSettings:
    """How the router is trained; the paper weighs the losses equally and trains at batch 1 on Alpaca.

    [ours] `lambda_d` is 20: our L_d is relative to the dense mean square and about a twentieth of the others when
    training starts; with 1 the router stays what the guide made of it. `guide_share` is the share of the steps over
    which the guide loss decays to 0 (the paper does not say). Both were chosen on validation text.
    """

    steps: int = 200
    batch_size: int = 4
    learning_rate: float = 1e-2
    lambda_d: float = 20.0
    lambda_s: float = 1.0
    lambda_g: float = 1.0
    guide_share: float = 0.25
    validations: int = 5
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "validations"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, must be at least 1.")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate is {self.learning_rate}, must be positive.")
        if not 0.0 <= self.guide_share <= 1.0:
            raise UserError(f"guide_share is {self.guide_share}, must be in [0, 1].")


class RouterTraining(L.LightningModule):
    """Trains `pruner.router` on windows (prompt routed, continuation dense) of a frozen `model`.

    The student pass is the masked executor: the function that inference computes, with straight-through gates. L_d is
    taken where it
    counts: on the hidden states that predict the continuation (positions P-1 ... P+C-2), after the final norm.

    Only the router is a submodule, so only the router is in checkpoints; the model is held beside the module tree.
    """

    def __init__(self, model: nn.Module, pruner: TokenPruner, settings: TrainingSettings):
        super().__init__()
        if not pruner.router.parameter_count:
            raise UserError(f"a {type(pruner.router).__name__} has nothing to train; use a DynamicRouter.")
        if pruner.schedule is None or not pruner.schedule.budget:
            raise UserError(
                "no block is routed under this schedule: there is nothing to train.\nGive a budget above 0."
            )
        self.router = pruner.router
        self.settings = settings
        self.__dict__["model"] = (
            model  # not through nn.Module: the frozen model stays out of checkpoints and of the optimiser
        )
        self.__dict__["decoder"] = find_decoder(model)[0]
        self.pruner = pruner
        self.teacher_router = StaticRouter()
        self.history: list[dict] = []
        self.validations: list[dict] = []
        self.last_soft: list[float] = []
        self.last_realised: list[float] = []

    def hidden_states(self, batch: dict) -> tuple[Tensor, Tensor]:
        """(student, teacher), each (B, C, D): last hidden states that predict the continuation."""
        ids, prompt = batch["input_ids"], batch["prompt_tokens"]
        with torch.no_grad():
            teacher = self.decoder(input_ids=ids, use_cache=False).last_hidden_state[:, prompt - 1 : -1]
        with self.pruner(self.model), self.pruner.masked(prompt):
            student = self.decoder(input_ids=ids, use_cache=False).last_hidden_state[:, prompt - 1 : -1]
        return student, teacher

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        student, teacher = self.hidden_states(batch)
        decisions = self.pruner.decisions
        soft = [soft_sparsity(d.probability, d.part.real, d.part.reserved) for d in decisions]
        static = [self.teacher_router.probability(d.context) for d in decisions]
        weight = guide_weight(self.settings.lambda_g, self.global_step, self.settings.steps, self.settings.guide_share)
        terms = {
            "distillation": distillation_loss(student, teacher),
            "sparsity": sparsity_loss([d.context.sparsity for d in decisions], soft),
            "guide": torch.stack([guide_loss(d.probability, s, d.part.real) for d, s in zip(decisions, static)]).mean(),
        }
        total = (
            self.settings.lambda_d * terms["distillation"]
            + self.settings.lambda_s * terms["sparsity"]
            + weight * terms["guide"]
        )
        if not torch.isfinite(total):
            raise UserError(
                f"the loss is {total.item()} at step {self.global_step}: {_readable(terms)}\nLower --learning_rate."
            )
        agreement = torch.stack([_agreement(d, s) for d, s in zip(decisions, static)]).mean()
        self._remember(terms, weight, total, agreement, soft, decisions)
        return total

    def _remember(
        self, terms: dict, weight: float, total: Tensor, agreement: Tensor, soft: list[Tensor], decisions
    ) -> None:
        row = {name: value.item() for name, value in terms.items()}
        row |= {"guide_weight": weight, "total": total.item(), "agreement": agreement.item()}
        self.log_dict({f"train/{name}": value for name, value in row.items()}, sync_dist=True, batch_size=1)
        self.history.append({"step": self.global_step + 1, **row})
        by_block = {d.context.block: s.item() for d, s in zip(decisions, soft)}
        hard = {d.context.block: _realised(d).item() for d in decisions}
        blocks = range(self.pruner.schedule.num_blocks)
        self.last_soft = [by_block.get(block, 0.0) for block in blocks]
        self.last_realised = [hard.get(block, 0.0) for block in blocks]

    def on_validation_epoch_start(self) -> None:
        self._kl: list[Tensor] = []

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        ids, prompt = batch["input_ids"], batch["prompt_tokens"]
        teacher = continuation_logits(self.model, ids, prompt).log_softmax(-1)
        with self.pruner(self.model):
            student = continuation_logits(self.model, ids, prompt)
        kl = kl_per_token(teacher, student)
        self._kl.append(kl.mean(dim=1))
        self.log("validation_kl", kl.mean(), batch_size=len(ids), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.validations.append({"step": self.global_step, "kl": torch.cat(self._kl).mean().item()})

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.router.parameters(), lr=self.settings.learning_rate)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.05, 1.0 - step / self.settings.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def fit_router(
    model,
    pruner: TokenPruner,
    train_windows,
    validation_windows,
    settings: TrainingSettings,
    folder,
    logger=None,
    progress=None,
) -> dict:
    """Train the pruner's router in place and keep the state that was best on the validation windows (`threshold`: the
    last).

    Writes `checkpoints/` (router, optimiser, counters; never the model) into `folder`. `progress(step, steps)` is told
    how far it is. Returns the stage's metrics: the curve of every loss, validation KL, target and soft sparsity per
    block.
    """
    from lightning.pytorch.callbacks import ModelCheckpoint

    L.seed_everything(settings.seed, verbose=False)
    system = RouterTraining(model, pruner, settings)
    data = WindowsData(train_windows, validation_windows, batch_size=settings.batch_size, seed=settings.seed)
    every = max(1, settings.steps // settings.validations)
    best = ModelCheckpoint(
        Path(folder) / "checkpoints", "best", monitor="validation_kl", save_last=True, enable_version_counter=False
    )
    trainer = L.Trainer(
        accelerator="gpu" if next(model.parameters()).is_cuda else "cpu",
        devices=1,
        max_steps=settings.steps,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=logger or False,
        callbacks=[best, _Progress(progress, settings.steps)],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.validate(system, datamodule=data, verbose=False)
    trainer.fit(system, datamodule=data)
    if best.best_model_path and pruner.choice == "topk":  # under `threshold` the best state prunes least
        state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
        system.load_state_dict(state)
    pruner.router.eval()
    return {
        "parameters": pruner.router.parameter_count,
        "steps": system.history,
        "validation_kl": system.validations,
        "best_validation_kl": best.best_model_score.item() if best.best_model_score is not None else None,
        "target_sparsity": list(pruner.schedule.sparsity),
        "soft_sparsity": system.last_soft,
        "realised_sparsity": system.last_realised,
    }


class _Progress(L.Callback):
    """Tells a function how far training is."""

    def __init__(self, tell, steps: int):
        self.tell, self.steps = tell, steps

    def on_train_batch_end(self, trainer, *args) -> None:
        if self.tell is not None:
            self.tell(trainer.global_step, self.steps)


def _realised(decision) -> Tensor:
    """Share of real tokens that skipped the block, by the hard decision."""
    return 1.0 - decision.keep.sum() / decision.part.real.sum().clamp(min=1)


def _agreement(decision, static: Tensor) -> Tensor:
    """Share of real, non-reserved tokens on which the router decides as the static router does."""
    free = decision.part.real & ~decision.part.reserved
    same = (decision.keep == (static > 0.5)) & free
    return same.sum() / free.sum().clamp(min=1)


def _readable(terms: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {value.item():.3g}" for name, value in terms.items())
