"""How much each block matters: Block Influence, redundancy, and the KL of pruning it alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import lightning
import torch
import torchmetrics
from torch import Tensor

from ftp_lightning.evaluation.continuation import continuation_logits, kl_per_token
from ftp_lightning.pruning.prefix import BlockStates, capture, first_needed_block, resume_from
from ftp_lightning.pruning.pruner import TokenPruner
from ftp_lightning.schedule import Schedule


class Share(torchmetrics.Metric):
    """A sum divided by a count, element by element, in float64; processes add up."""

    full_state_update = False

    def __init__(self, *shape: int):
        super().__init__()
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: int) -> None:
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        return self.total / self.count


class BlockSensitivity(lightning.LightningModule):
    """Measures N blocks over batches {"input_ids": (B, P + C), "prompt_tokens": P}, by `Trainer.predict` (or `test`).

    * Block Influence of block l: 1 - mean over prompt tokens of cos(block input, block output) (ShortGPT, 2024).
    * Redundancy: share of prompt tokens whose cosine is > a threshold (the paper's motivation, threshold 0.8).
    * KL: KL(dense || pruned) per continuation token when block l alone is pruned at a level [ours: method.md, 8].

    The dense model runs once per batch; the pruned forward of block l starts at block l (`pruning.prefix`). That
    holds for routers that look at nothing below but the attention table.

    Args:
        model: a Hugging Face causal LM with nothing attached.
        make_pruner: Schedule -> TokenPruner.
        levels: sparsities in (0, 1] at which each block is pruned alone.
        thresholds: cosines above which a token counts as redundant.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        make_pruner: Callable[[Schedule], TokenPruner],
        num_blocks: int,
        levels: Sequence[float] = (0.3, 0.6, 0.9),
        thresholds: Sequence[float] = (0.8,),
    ):
        super().__init__()
        if not levels or list(levels) != sorted({*levels}) or levels[0] <= 0:
            raise ValueError(f"levels must rise and be > 0, got {list(levels)}")
        self.model, self.make_pruner, self.num_blocks = model, make_pruner, num_blocks
        self.levels, self.thresholds = tuple(levels), tuple(thresholds)
        self.pruners = [[make_pruner(_alone(block, s, num_blocks)) for s in levels] for block in range(num_blocks)]
        self.cosine = Share(num_blocks)
        self.redundancy = Share(len(self.thresholds), num_blocks)
        self.kl = Share(num_blocks, len(self.levels))

    def predict_step(self, batch: dict, batch_idx: int) -> Tensor:
        """KL per continuation token of this batch, (N, levels)."""
        return self._measure(batch["input_ids"], int(batch["prompt_tokens"]))

    def test_step(self, batch: dict, batch_idx: int) -> None:
        self._measure(batch["input_ids"], int(batch["prompt_tokens"]))

    def on_predict_epoch_end(self) -> None:
        self.summary()  # while the processes still are together; the metrics remember what they computed

    def on_test_epoch_end(self) -> None:
        self.summary()

    def summary(self) -> dict:
        """JSON-able: block_influence [N], redundancy {threshold: [N]}, kl [N][levels], tokens measured."""
        influence = 1.0 - self.cosine.compute()
        redundancy, kl = self.redundancy.compute(), self.kl.compute()
        return {
            "num_blocks": self.num_blocks,
            "levels": list(self.levels),
            "thresholds": list(self.thresholds),
            "block_influence": influence.tolist(),
            "redundancy": {str(t): row for t, row in zip(self.thresholds, redundancy.tolist())},
            "kl": kl.tolist(),
            "tokens": {"prompt": int(self.cosine.count), "continuation": int(self.kl.count)},
        }

    @torch.no_grad()
    def _measure(self, input_ids: Tensor, prompt_tokens: int) -> Tensor:
        with capture(self.model) as states:
            dense = continuation_logits(self.model, input_ids, prompt_tokens)
        self._add_cosines(states, prompt_tokens)
        teacher = dense.log_softmax(dim=-1)
        rows = [
            torch.stack(
                [self._kl_alone(block, p, states, teacher, input_ids, prompt_tokens) for p in self.pruners[block]]
            )
            for block in range(self.num_blocks)
        ]
        total, tokens = torch.stack(rows), teacher.shape[0] * teacher.shape[1]
        self.kl.update(total, tokens)
        return total / tokens

    def _add_cosines(self, states: BlockStates, prompt_tokens: int) -> None:
        """Cosines between a block's input and output on the prompt, (N, B, P), in at least float32."""
        cosine = torch.stack(
            [
                torch.cosine_similarity(
                    _prompt(states, block, prompt_tokens), _prompt(states, block + 1, prompt_tokens), dim=-1
                )
                for block in range(self.num_blocks)
            ]
        ).double()
        tokens = cosine[0].numel()
        above = torch.stack([(cosine > threshold).sum((1, 2)) for threshold in self.thresholds])
        self.cosine.update(cosine.sum((1, 2)), tokens)
        self.redundancy.update(above, tokens)

    def _kl_alone(
        self,
        block: int,
        pruner: TokenPruner,
        states: BlockStates,
        teacher: Tensor,
        input_ids: Tensor,
        prompt_tokens: int,
    ) -> Tensor:
        """Summed KL of one batch with one block pruned."""
        router = pruner.router
        first = first_needed_block(self.model, block, router.needs_attention, router.one_pass)
        with resume_from(self.model, first, states), pruner(self.model):
            logits = continuation_logits(self.model, input_ids, prompt_tokens)
        return kl_per_token(teacher, logits).double().sum()


def _alone(block: int, sparsity: float, num_blocks: int) -> Schedule:
    return Schedule([sparsity if other == block else 0.0 for other in range(num_blocks)])


def _prompt(states: BlockStates, block: int, prompt_tokens: int) -> Tensor:
    hidden = states.entering(block)[:, :prompt_tokens]
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))
