"""How much each block matters: what it changes, what the loss says of it, and the KL of pruning it alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import lightning
import torch
import torchmetrics
from torch import Tensor

from ftp_lightning.data.rows import Batch, scored_tokens
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation import redundancy
from ftp_lightning.evaluation.continuation import continuation_logits, kl_per_token, nll_per_token, row_means
from ftp_lightning.pruning.devices import home
from ftp_lightning.pruning.pruner import TokenPruner
from ftp_lightning.schedule import Schedule
from ftp_lightning.training.resume import BlockStates, capture, differentiable, first_needed_block, resume_from

POSITION = {
    "jaccard": redundancy.pooled_jaccard,
    "jaccard_by_chance": redundancy.chance_jaccard,
    "explained": redundancy.explained_by_position,
    "guessed": redundancy.guessed_from_position,
    "guessed_without": redundancy.guessed_without_position,
}
"""What the summary tells of the positions of redundant tokens, by name."""


COUNTED = ("texts", "prompt tokens", "continuation tokens", "dense", "gradient", "kl")
"""What is counted, padding left out: of the last three, tokens times the share of the blocks that ran; a backward pass
is a forward's."""


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


class Total(torchmetrics.Metric):
    """A sum, element by element, in float64; processes add up."""

    full_state_update = False

    def __init__(self, *shape: int):
        super().__init__()
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, place: int, amount: float) -> None:
        self.total[place] += amount

    def compute(self) -> Tensor:
        return self.total.clone()


class BlockSensitivity(lightning.LightningModule):
    """Measures N blocks over batches as `data.rows.Rows` makes them, by `Trainer.predict` (or `test`).

    * Block Influence of block l: 1 - mean over prompt tokens of cos(block input, block output) (ShortGPT, 2024).
    * Redundancy: share of prompt tokens whose cosine is > a threshold (the paper's motivation, threshold 0.8), and
      how far their positions are the same in every text (`evaluation.redundancy`), where prompts are equally long.
    * Gradient: mean over prompt tokens of |g dL/dg| at g = 1, where g gates this block's update of this token,
      h + g (block(h) - h), and L is the mean negative log-likelihood of the row's own continuation: to first order,
      how far L moves when one token skips the block [ours, after Molchanov et al. 2019]. Of the KL to the dense model
      the first order is 0, hence the likelihood. A gate closes the update alone, as `keep` does.
    * KL: KL(dense || pruned) per continuation token when block l alone is pruned at a level [ours: method.md, 8].

    The dense model runs once per batch, forward and, for the gradient, backward; the pruned forward of block l starts
    at block l (`training.resume`). That holds for routers that look at nothing below but the attention table.

    Args:
        model: a Hugging Face causal LM with nothing attached.
        makers: name (of a kv mode, say) -> Schedule -> TokenPruner. Each is measured; `kl` is that of the first.
        levels: sparsities in (0, 1] at which each block is pruned alone.
        thresholds: cosines above which a token counts as redundant.
        prompt_tokens: P, the same in all batches, so that positions are compared across texts; None: prompts differ in
            length, and `position` is left out.
        gradient: whether to measure it: it takes the memory of one backward pass through frozen weights.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        makers: Mapping[str, Callable[[Schedule], TokenPruner]],
        num_blocks: int,
        levels: Sequence[float] = (0.3, 0.6, 0.9),
        thresholds: Sequence[float] = (0.7, 0.8, 0.9),
        *,
        prompt_tokens: int | None,
        gradient: bool = True,
    ):
        super().__init__()
        if not levels or list(levels) != sorted({*levels}) or levels[0] <= 0:
            raise ValueError(f"levels must rise and be > 0, got {list(levels)}")
        if not makers:
            raise ValueError("makers is empty, nothing would be pruned")
        # not through nn.Module: Lightning would move a model that lies on several devices
        self.__dict__["model"] = model
        self.num_blocks, self.names = num_blocks, tuple(makers)
        self.levels, self.thresholds = tuple(levels), tuple(thresholds)
        self.prompt_tokens, self.gradient = prompt_tokens, gradient
        self.pruners = [
            [[make(_alone(block, s, num_blocks)) for s in levels] for block in range(num_blocks)]
            for make in makers.values()
        ]
        self.cosine = Share(num_blocks)
        self.redundant = Share(len(self.thresholds), num_blocks, prompt_tokens or 1)
        self.saliency = Share(num_blocks)
        self.kl = Share(len(self.names), num_blocks, len(self.levels))
        self.counted = Total(len(COUNTED))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """KL per continuation token of this batch, (makers, N, levels)."""
        return self._measure(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure(batch)

    def on_predict_start(self) -> None:
        self._add_up_over_the_trainers_processes()

    def on_test_start(self) -> None:
        self._add_up_over_the_trainers_processes()

    def _add_up_over_the_trainers_processes(self) -> None:
        """Metrics would wait for every process of a launcher, also where this one measures alone."""
        if self.trainer.world_size == 1:
            for metric in (self.cosine, self.redundant, self.saliency, self.kl, self.counted):
                metric.distributed_available_fn = _never

    def on_predict_epoch_end(self) -> None:
        self.summary()  # while the processes still are together; the metrics remember what they computed

    def on_test_epoch_end(self) -> None:
        self.summary()

    def summary(self) -> dict:
        """JSON-able: block_influence [N], redundancy {threshold: [N]}, position {threshold: {measure: [N]}}, gradient
        [N] where it was measured, kl [N][levels] of the first maker, kl_by_kv {name: [N][levels]}, tokens measured,
        forward_tokens {dense, gradient, kl} that it took. What is not defined is None."""
        shares, kl = self.redundant.compute(), self.kl.compute()
        texts, prompt, continuation, *forwards = (round(total) for total in self.counted.compute().tolist())
        found = {
            "num_blocks": self.num_blocks,
            "levels": list(self.levels),
            "thresholds": list(self.thresholds),
            "block_influence": (1.0 - self.cosine.compute()).tolist(),
            "redundancy": {str(t): row.mean(-1).tolist() for t, row in zip(self.thresholds, shares)},
            "kl": kl[0].tolist(),
            "kl_by_kv": dict(zip(self.names, kl.tolist())),
            "tokens": {"prompt": prompt, "continuation": continuation},
            "forward_tokens": dict(zip(COUNTED[3:], forwards)),
        }
        if self.prompt_tokens is not None:
            positions = zip(self.thresholds, shares)
            found["position"] = {str(t): _position(row * texts, texts) for t, row in positions}
        return found | ({"gradient": self.saliency.compute().tolist()} if self.gradient else {})

    def _measure(self, batch: Batch) -> Tensor:
        even = _real(batch) is None and batch["prompt_tokens"] == self.prompt_tokens
        if self.prompt_tokens is not None and not even:
            raise ValueError(f"a batch has prompts that are not of {self.prompt_tokens} tokens like all others")
        for name, tokens in (("texts", len(batch["input_ids"])), *_tokens(batch).items()):
            self.counted.update(COUNTED.index(name), tokens)
        states, dense = self._dense(batch)
        with torch.no_grad():
            self._add_cosines(states, batch)
            return self._add_kl(states, dense.log_softmax(dim=-1), batch)

    def _dense(self, batch: Batch) -> tuple[BlockStates, Tensor]:
        """States between the blocks and logits of the dense model; adds the gradient where it is asked for."""
        self.counted.update(COUNTED.index("dense"), sum(_tokens(batch).values()))
        if not self.gradient:
            with torch.no_grad(), capture(self.model) as states:
                return states, continuation_logits(self.model, **batch)
        try:
            with torch.inference_mode(False), torch.enable_grad():  # Lightning predicts in inference mode
                batch = cast(Batch, {name: x.clone() if isinstance(x, Tensor) else x for name, x in batch.items()})
                with differentiable(self.model), capture(self.model) as states:
                    dense = continuation_logits(self.model, **batch)
                nll = nll_per_token(dense, batch["input_ids"][:, batch["prompt_tokens"] :])
                self._add_saliency(states, row_means(nll, scored_tokens(batch)), batch)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"the gradient cannot be taken: {reason}\nLeave it out with --no_gradient.") from error
        self.counted.update(COUNTED.index("gradient"), sum(_tokens(batch).values()))
        return states.detached(), dense.detach()

    def _add_saliency(self, states: BlockStates, nll: Tensor, batch: Batch) -> None:
        """dL/dg of a gate at 1 is the inner product of dL/d(block output) and the block's update. nll (B,)."""
        entering = [passes[0] for passes in states.passes]  # the first pass is the prompt
        losses = nll.sum()  # rows decide alone, so each gets the gradient of its own mean
        slopes = torch.autograd.grad(losses, entering[1:], allow_unused=True, materialize_grads=True)
        gates = [
            _without_padding((_wide(slope) * (_wide(after) - _wide(before).to(after.device))).sum(-1).abs(), batch)
            .double()
            .sum()
            .to(nll.device)
            for slope, before, after in zip(slopes, entering, entering[1:])
        ]
        self.saliency.update(torch.stack(gates).detach(), _tokens(batch)["prompt tokens"])

    def _add_cosines(self, states: BlockStates, batch: Batch) -> None:
        """Cosines between a block's input and output on the prompt, (N, B, P), in at least float32."""
        length = batch["prompt_tokens"]
        prompts = [
            _wide(states.entering(block)[:, :length]).to(home(self.model)) for block in range(self.num_blocks + 1)
        ]
        cosine = torch.stack(
            [torch.cosine_similarity(before, after, dim=-1) for before, after in zip(prompts, prompts[1:])]
        ).double()
        above = torch.stack([_without_padding(cosine > threshold, batch).sum(1) for threshold in self.thresholds])
        tokens = _tokens(batch)["prompt tokens"]
        self.cosine.update(_without_padding(cosine, batch).sum((1, 2)), tokens)
        if self.prompt_tokens is None:
            self.redundant.update(above.sum(-1, keepdim=True), tokens)
        else:
            self.redundant.update(above, cosine.shape[1])

    def _add_kl(self, states: BlockStates, teacher: Tensor, batch: Batch) -> Tensor:
        """Prune each block alone, in every way and at every level: mean KL of this batch, (makers, N, levels)."""
        total = torch.stack(
            [
                self._kl_alone(block, pruner, states, teacher, batch)
                for pruners in self.pruners
                for block in range(self.num_blocks)
                for pruner in pruners[block]
            ]
        ).reshape(self.kl.total.shape)
        tokens = _tokens(batch)["continuation tokens"]
        self.kl.update(total, tokens)
        return total / tokens

    def _kl_alone(self, block: int, pruner: TokenPruner, states: BlockStates, teacher: Tensor, batch: Batch) -> Tensor:
        """Summed KL of one batch with one block pruned."""
        first = first_needed_block(self.model, block, pruner.router.needs, pruner.reads_from)
        with resume_from(self.model, first, states), pruner(self.model):
            logits = continuation_logits(self.model, **batch)
        ran = sum(_tokens(batch).values()) * (1 - first / self.num_blocks)
        self.counted.update(COUNTED.index("kl"), ran)
        kl, scored = kl_per_token(teacher, logits), scored_tokens(batch)
        return (kl if scored is None else kl.masked_fill(~scored, 0.0)).double().sum()


def _real(batch: Batch) -> Tensor | None:
    """(B, P) bool, the real tokens of the prompts; None = all."""
    mask = batch.get("attention_mask")
    prompt = None if mask is None else mask[:, : batch["prompt_tokens"]].bool()
    return None if prompt is None or prompt.all() else prompt


def _tokens(batch: Batch) -> dict[str, int]:
    """How many real tokens the batch has in prompts and in continuations."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    prompt = int(mask[:, : batch["prompt_tokens"]].sum())
    return {"prompt tokens": prompt, "continuation tokens": int(mask.sum()) - prompt}


def _without_padding(values: Tensor, batch: Batch) -> Tensor:
    """(..., B, P) with 0 where the prompt is padded."""
    real = _real(batch)
    return values if real is None else values.masked_fill(~real.to(values.device), 0)


def _never() -> bool:
    return False


def _alone(block: int, sparsity: float, num_blocks: int) -> Schedule:
    return Schedule([sparsity if other == block else 0.0 for other in range(num_blocks)])


def _wide(hidden: Tensor) -> Tensor:
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


def _position(counts: Tensor, texts: int) -> dict[str, list[float | None]]:
    """Every measure of POSITION for counts (N, P)."""
    counts = counts.round()
    measured = {name: measure(counts, texts).tolist() for name, measure in POSITION.items()}
    return {name: [x if math.isfinite(x) else None for x in values] for name, values in measured.items()}
