"""What a distillation learns from: what the dense model does with rows, computed once.

Shapes: B rows, S tokens that entered the model, P prompt tokens, C continuation tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ftp_lightning.data.rows import Batch, Rows, moved
from ftp_lightning.errors import UserError
from ftp_lightning.evaluation.continuation import continuation_logits
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.devices import home
from ftp_lightning.pruning.kept import padding_arguments
from ftp_lightning.schedule import first_routed
from ftp_lightning.training.resume import capture, first_needed_block


@dataclass(frozen=True)
class Lesson:
    """What a batch of rows teaches, computed once by the dense model.

    Attributes:
        batch: token ids, prompt length and mask of its rows.
        first: the lowest block that the student runs.
        entering: (B, S, D), what enters that block.
        keep: the arguments of a FixedRouter that takes the router's decisions, where nothing that is trained can change
            them; else None.
        teacher: (B, C, V) float16, log-probabilities of the continuation.
    """

    batch: Batch
    first: int
    entering: Tensor
    keep: dict[str, list[Tensor]] | None
    teacher: Tensor


@torch.no_grad()
def lessons(
    model: nn.Module,
    pruner: TokenPruner,
    rows: Rows,
    batch_size: int = 1,
    between: Callable[[], None] = lambda: None,
) -> list[Lesson]:
    """What the dense model does with each batch of rows, for `Distillation`; `between` is called before each.

    Memory, on the CPU: per token D numbers of the model's dtype, per continuation token 2 V bytes. Time: one dense and
    one pruned forward.
    """
    found = []
    for _, batch in rows.batches(batch_size):
        between()
        batch = moved(batch, home(model))
        replayed = _decides_below(pruner)
        first = distilled_from(pruner) if replayed else _first_needed(model, pruner)
        with capture(model, only=first) as states:
            teacher = continuation_logits(model, **batch).log_softmax(-1).half().cpu()
        entering = states.entering(first)
        keep = None
        if replayed:
            with pruner(model):
                model(**_prompt_of(batch), use_cache=False, logits_to_keep=1)
            keep = _decided(pruner)
        found.append(Lesson(batch, first, entering.cpu(), keep, teacher))
    return found


def distilled_from(pruner: TokenPruner) -> int:
    """The lowest block that tokens skip. UserError where there is none."""
    found = first_routed(pruner.scheduled.sparsity)
    if found is None:
        raise UserError("no token skips a block under this schedule: there is nothing to distil.\nGive another budget.")
    return found


def _first_needed(model: nn.Module, pruner: TokenPruner) -> int:
    return first_needed_block(model, distilled_from(pruner), pruner.router.needs, pruner.reads_from)


def _decides_below(pruner: TokenPruner) -> bool:
    """Whether all decisions are made from what blocks below the first routed one do, which nothing trained changes, and
    a FixedRouter can say them: it addresses either blocks or parts."""
    needs = pruner.router.needs
    if needs.hidden or ("block" in pruner.addressed and pruner.parts != "block"):
        return False
    return not needs.attention or bool(needs.once) or pruner.attention_score.ends_by(distilled_from(pruner))


def _decided(pruner: TokenPruner) -> dict[str, list[Tensor]]:
    """What the last prompt's tokens entered; blocks that are not routed are said to be entered by padding, too, as they
    are when nobody decides."""
    trace = pruner.trace
    parts = ("keep",) if pruner.parts == "block" else ("keep_attention", "keep_mlp")
    return {
        part: [torch.ones_like(k) if s == 0.0 else k for k, s in zip(getattr(trace, part), pruner.scheduled.sparsity)]
        for part in parts
    }


def _prompt_of(batch: Batch) -> dict[str, Tensor]:
    about = padding_arguments(batch.get("attention_mask"), 0, batch["prompt_tokens"])
    return {"input_ids": batch["input_ids"][:, : batch["prompt_tokens"]], **about}
