"""Router training: a frozen model, a router of a few hundred parameters, three losses. A thin system; formulas are in
`losses`, running it is in `fitting`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import zip_longest

import lightning as L
import torch
from torch import Tensor, nn

from ftp_lightning import losses
from ftp_lightning.data.rows import Batch, scored_tokens
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.bench import TEACHER_BYTES
from ftp_lightning.evaluation.continuation import continuation_logits
from ftp_lightning.lit.training_settings import TrainingSettings
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.decide import choose_topk
from ftp_lightning.pruning.family import find_decoder
from ftp_lightning.pruning.kept import padding_arguments
from ftp_lightning.routing import StaticRouter
from ftp_lightning.schedule import Schedule, first_routed
from ftp_lightning.schedule_family import ScheduleFamily
from ftp_lightning.training.listening import listening, needed_later
from ftp_lightning.training.resume import capture, first_needed_block, resume_from

__all__ = ["RouterTraining", "TrainingSettings"]


class RouterTraining(L.LightningModule):
    """Trains `pruner.router` on rows (prompt routed, continuation dense) of a frozen `model`.

    The student pass is the masked executor: the function that inference computes, with the gates' gradient. L_d is
    taken where it counts: on the positions that predict the continuation (P-1 ... P+C-2), after the final norm; with
    scope "sequence" on all positions of the routed text.

    A batch is {"input_ids" (B, P + C), "prompt_tokens" P, "number": of the batch in the whole training}, and where rows
    are padded "attention_mask": prompts on the left, continuations on the right. Rows without a token to score count
    for nothing and are counted.

    Only the router is a submodule, so only the router is in checkpoints; the model is held beside the module tree.

    Args:
        family: schedules to draw from: every forward has one of its own, its budget uniform in `budgets`, so that one
            router learns to serve all of them (the sparsity is one of its factors). The pruner's own schedule is then
            not trained on.
        budgets: (lowest, highest) of them.
    """

    def __init__(
        self,
        model: nn.Module,
        pruner: TokenPruner,
        settings: TrainingSettings,
        family: ScheduleFamily | None = None,
        budgets: tuple[float, float] = (0.1, 0.8),
    ):
        super().__init__()
        if not pruner.router.parameter_count:
            raise UserError(f"a {type(pruner.router).__name__} has nothing to train; use a DynamicRouter.")
        if family is None and (pruner.schedule is None or not pruner.schedule.budget):
            raise UserError(
                "no block is routed under this schedule: there is nothing to train.\nGive a budget above 0."
            )
        self.router, self.settings, self.pruner = pruner.router, settings, pruner
        self.family, self.budgets = family, budgets
        # not through nn.Module: the frozen model stays out of checkpoints and of the optimiser
        self.__dict__["model"], self.__dict__["decoder"] = model, find_decoder(model)[0]
        self.teacher_router = StaticRouter()
        self.history: list[dict] = []
        self.validations: list[dict] = []
        self.last_soft: list[float] = []
        self.last_realised: list[float] = []
        self._forwards: list[dict] = []  # of the step that is going on
        self._dense: dict[int, Tensor] = {}  # batch of the validation -> the dense model's logits, on the CPU
        self.fingerprint = ""  # of all that decides the result, for those who go on from a checkpoint
        self.gather: Callable[[list[Tensor]], list[list[Tensor]]] = lambda own: [own]  # validation batches, by process

    # ---------------------------------------------------------------- schedules

    def training_schedule(self, number: int) -> Schedule:
        """The schedule of batch `number`: the pruner's, or one of the family."""
        if self.family is None:
            return self.pruner.scheduled
        return self.family.at(random.Random(f"{self.settings.seed}/budget/{number}").uniform(*self.budgets))

    def validation_schedules(self) -> Sequence[Schedule]:
        """Of a family the lowest, the middle and the highest budget."""
        if self.family is None:
            return [self.pruner.scheduled]
        low, high = self.budgets
        return [self.family.at(budget) for budget in (low, (low + high) / 2, high)]

    # ---------------------------------------------------------------- training

    def outputs(self, batch: dict) -> dict[str, Tensor]:
        """Of the scored positions: "hidden" (B, C, D), and where a loss wants them "logits" (B, C, V)."""
        ids, first = batch["input_ids"], self._scored_from(batch)
        about = padding_arguments(batch.get("attention_mask")) | {"use_cache": False}
        if self.settings.distillation == "mse":
            return {"hidden": self.decoder(input_ids=ids, **about).last_hidden_state[:, first:-1].to(ids.device)}
        from ftp_lightning.search.criteria import entering_head

        with entering_head(self.model) as seen:
            logits = self.model(input_ids=ids, logits_to_keep=ids.shape[1] - first, **about).logits
        return {"hidden": seen[0][:, :-1].to(ids.device), "logits": logits[:, :-1]}

    def student_and_teacher(self, batch: dict) -> tuple[dict[str, Tensor], dict[str, Tensor], TokenPruner]:
        """Outputs of the pruned and of the dense model, and the pruner that was in force."""
        number = batch.get("number", 0)
        pruner = self.pruner.with_schedule(self.training_schedule(number))
        first = self._first_needed(pruner)
        with torch.no_grad(), self._listening(batch) as self.heard, capture(self.model, only=first) as states:
            teacher = self.outputs(batch)
        routed = batch["prompt_tokens"] if self.settings.scope == "prompt" else batch["input_ids"].shape[1]
        gates = self.settings.gates_at(self.global_step, number)
        with resume_from(self.model, first, states), pruner(self.model):
            with pruner.masked(routed, gates, self.settings.recompute):
                return self.outputs(batch), teacher, pruner

    def _first_needed(self, pruner: TokenPruner) -> int:
        """The lowest block that the student must run: what enters it the teacher has computed."""
        routed = first_routed(pruner.scheduled.sparsity) or 0
        return first_needed_block(self.model, routed, pruner.router.needs, pruner.reads_from)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        scored = self._scored(batch)
        student, teacher, pruner = self.student_and_teacher(batch)
        decisions = pruner.decisions
        soft = [losses.soft_sparsity(d.probability, d.routed.real, d.routed.reserved) for d in decisions]
        static = [self.teacher_router.probability(d.context) for d in decisions]
        guides = static if self.settings.guide == "static" else self._by_the_future(decisions)
        terms = {
            "distillation": self._distillation(student, teacher, scored),
            "sparsity": losses.sparsity_loss(
                [d.context.sparsity for d in decisions], soft, self.settings.sparsity_loss
            ),
            "guide": torch.stack([self._guide(d, s) for d, s in zip(decisions, guides)]).mean(),
        }
        weights = self.weights()
        total = sum(weights[name] * term for name, term in terms.items())
        if not torch.isfinite(total):
            raise UserError(
                f"the loss is {total.item()} at step {self.global_step}: {_readable(terms)}\nLower --learning_rate."
            )
        self._remember(terms, weights, total, batch, scored, decisions, static, soft)
        return total

    def weights(self) -> dict[str, float]:
        """lambda of each term, now."""
        s = self.settings
        guide = losses.guide_weight(s.lambda_g, self.global_step, s.steps, s.guide_share, s.guide_decay)
        return {"distillation": s.lambda_d, "sparsity": s.lambda_s, "guide": guide}

    def _distillation(self, student: dict[str, Tensor], teacher: dict[str, Tensor], scored: Tensor | None) -> Tensor:
        kind, parts = self.settings.distillation, []
        if kind != "kl":
            parts.append(losses.distillation_loss(student["hidden"], teacher["hidden"], scored))
        if kind != "mse":
            parts.append(losses.kl_rows(student["logits"], teacher["logits"], scored).mean())
        return torch.stack(parts).sum()

    def _listening(self, batch: dict):
        """Hears what the scored tokens attend to, where the guide wants to know."""
        if self.settings.guide == "static":
            return nullcontext()
        mask, last = batch.get("attention_mask"), batch["input_ids"].shape[1] - batch["prompt_tokens"]
        return listening(self.model, last, None if mask is None else mask.bool())

    def _by_the_future(self, decisions) -> list[Tensor]:
        """(B, P) of each decision: as many tokens as the schedule wants, those that are most attended to later."""
        needed, guides = needed_later(self.heard), []
        for d in decisions:
            tokens, counts = d.routed.real.shape[1], d.routed.counts(d.context.sparsity)
            guides.append(choose_topk(needed[d.context.block][:, :tokens], d.routed, counts).float())
        return guides

    def _guide(self, decision, static: Tensor) -> Tensor:
        return losses.guide_loss(decision.probability, static, decision.routed.real, self.settings.guide_balanced)

    def _scored_from(self, batch: dict) -> int:
        return batch["prompt_tokens"] - 1 if self.settings.scope == "prompt" else 0

    def _scored(self, batch: dict) -> Tensor | None:
        """(B, C) bool, the real ones of the scored positions: those that predict a real token; None = all."""
        mask = batch.get("attention_mask")
        if mask is None:
            return None
        first = self._scored_from(batch)
        return (mask[:, first:-1] * mask[:, first + 1 :]).bool()

    # ---------------------------------------------------------------- the record

    @torch.no_grad()
    def _remember(self, terms, weights, total, batch, scored, decisions, static, soft) -> None:
        row = {name: value.item() for name, value in terms.items()}
        row |= {f"weighted_{name}": weights[name] * row[name] for name in terms}
        agreement = [_agreement(d, s) for d, s in zip(decisions, static)]
        row |= {"guide_weight": weights["guide"], "total": total.item()}
        row |= {name: sum(found[name] for found in agreement) / len(agreement) for name in ("agreement", "f1")}
        mask = batch.get("attention_mask")
        tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        row |= {"tokens": tokens, "empty_rows": 0 if scored is None else int((~scored.any(1)).sum())}
        self._forwards.append(row)
        by_block = {d.context.block: s.mean().item() for d, s in zip(decisions, soft)}
        hard = {d.context.block: _realised(d) for d in decisions}
        blocks = range(self.pruner.scheduled.num_blocks)
        self.last_soft = [by_block.get(block, 0.0) for block in blocks]
        self.last_realised = [hard.get(block, 0.0) for block in blocks]

    @property
    def within_step(self) -> bool:
        """Whether some forwards of a step are done and others not."""
        return bool(self._forwards)

    def on_before_optimizer_step(self, optimizer) -> None:
        """One row per step: means over its forwards (of this process), sums of what is counted."""
        counted = ("tokens", "empty_rows")
        rows, self._forwards = self._forwards, []
        row = {name: sum(found[name] for found in rows) for name in rows[0]}
        row |= {name: row[name] / len(rows) for name in row if name not in counted}
        gradients = [p.grad.norm() for p in self.router.parameters() if p.grad is not None]
        if self.trainer.world_size > 1:
            row = self._over_processes(row, counted)
        row["gradient_norm"] = torch.stack(gradients).norm().item() if gradients else 0.0
        row["seen"] = row.pop("tokens") + (self.history[-1]["seen"] if self.history else 0)
        logged = row | {f"soft_sparsity/block_{block}": s for block, s in enumerate(self.last_soft)}
        logged |= {f"realised_sparsity/block_{block}": s for block, s in enumerate(self.last_realised)}
        self.log_dict({f"train/{name}": float(value) for name, value in logged.items()}, sync_dist=True, batch_size=1)
        self.history.append({"step": self.global_step + 1, **row})

    def _over_processes(self, row: dict, counted: Sequence[str]) -> dict:
        """The row of all processes together: sums of what is counted, means of the rest."""
        values = torch.tensor(list(row.values()), dtype=torch.float64, device=self.device)
        total = dict(zip(row, self.trainer.strategy.reduce(values, reduce_op="sum").tolist()))
        return {n: int(t) if n in counted else t / self.trainer.world_size for n, t in total.items()}

    # ---------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self._kl: list[Tensor] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._kl.append(self.validate_rows(batch, self._dense_logits(batch, batch_idx)))

    @torch.no_grad()
    def validate_rows(self, batch: Batch, teacher: Tensor | None = None) -> Tensor:
        """(B,): KL per continuation token of the deployed computation, the mean over the validation schedules.

        teacher: the dense model's logits (B, C, V), where they are known."""
        teacher, scored = self._continuation(batch) if teacher is None else teacher, scored_tokens(batch)
        rows = []
        for schedule in self.validation_schedules():
            with self.pruner.with_schedule(schedule)(self.model):
                rows.append(losses.kl_rows(self._continuation(batch), teacher, scored))
        return torch.stack(rows).mean(0)

    def _dense_logits(self, batch: Batch, number: int) -> Tensor:
        """(B, C, V) of validation batch `number`: computed once and kept on the CPU, as far as `TEACHER_BYTES` goes."""
        if number in self._dense:
            return self._dense[number].to(batch["input_ids"].device)
        logits = self._continuation(batch)
        if sum(kept.nbytes for kept in self._dense.values()) + logits.nbytes <= TEACHER_BYTES:
            self._dense[number] = logits.cpu()
        return logits

    def _continuation(self, batch: Batch) -> Tensor:
        return continuation_logits(self.model, batch["input_ids"], batch["prompt_tokens"], batch.get("attention_mask"))

    def on_validation_epoch_end(self) -> None:
        shares = self.gather([kl.cpu() for kl in self._kl])  # batch n is the n // W-th of process n mod W
        kl = torch.cat([one for batches in zip_longest(*shares) for one in batches if one is not None]).mean()
        self.validations.append({"step": self.global_step, "kl": kl.item()})
        self.log("validation_kl", kl, sync_dist=True)  # the same in all, but Lightning warns without

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint |= {"fingerprint": self.fingerprint, "last_sparsity": [self.last_soft, self.last_realised]}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.last_soft, self.last_realised = checkpoint["last_sparsity"]

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.router.parameters(), lr=self.settings.learning_rate)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.05, 1.0 - step / self.settings.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def _realised(decision) -> float:
    """Share of real tokens that skipped the block, by the hard decision."""
    return 1.0 - (decision.keep.sum() / decision.routed.real.sum().clamp(min=1)).item()


def _agreement(decision, static: Tensor) -> dict[str, float]:
    """How the router's decisions on real, non-reserved tokens compare with the static router's: the share that is the
    same, and F1 of the tokens to compute."""
    free = decision.routed.real & ~decision.routed.reserved
    own, other = decision.keep & free, (static > 0.5) & free
    same = ((own == other) & free).sum() / free.sum().clamp(min=1)
    f1 = 2 * (own & other).sum() / (own.sum() + other.sum()).clamp(min=1)
    return {"agreement": same.item(), "f1": f1.item()}


def _readable(terms: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {value.item():.3g}" for name, value in terms.items())
