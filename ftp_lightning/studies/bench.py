"""What every run of a study is measured on: windows of held-out text, and questions that need the prompt."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ftp_lightning.data.choices import recall_items
from ftp_lightning.data.sources import load_documents
from ftp_lightning.data.windows import Windows
from ftp_lightning.evaluation.continuation import evaluate_windows, teacher_logprobs
from ftp_lightning.evaluation.greedy import Question, as_question, greedy_answers
from ftp_lightning.evaluation.statistics import kept
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.flops import realised_flops_reduction
from ftp_lightning.stages.inputs import check_questions, load_model, mixed_windows, text_named

if TYPE_CHECKING:
    from torch import Tensor

    from ftp_lightning.studies.trial import TrialStage

BATCH = 16
OTHER_SEED = 1_000_003
"""Added to the seed, so that runs are not measured on the windows that their training was validated on [ours]."""


@dataclass(frozen=True)
class Bench:
    """The dense model on the held-out text of one seed: all runs of a study with this seed are measured against it."""

    model: Any
    windows: Windows
    teacher: Tensor
    questions: list[Question]
    right: list[bool]
    without: list[bool]

    @property
    def need(self) -> list[bool]:
        """Which questions need the passage: dense answers them right with it, and wrong with its facts replaced."""
        return [with_it and not without for with_it, without in zip(self.right, self.without, strict=True)]


_known: dict[tuple, Bench] = {}
"""The last bench of this process: runs come seed by seed."""


def measure(settings: TrialStage, pruner: TokenPruner) -> dict[str, Any]:
    """KL per continuation token, with one mean per window; answers kept, with one verdict per question; what was
    skipped, and the share of a prompt's FLOPs that it saves."""
    bench = bench_of(settings)
    text = evaluate_windows(bench.model, bench.windows, pruner, batch_size=BATCH, teacher=bench.teacher)
    cut = realised_flops_reduction(bench.model, pruner.trace.routed, pruner.kv, rank=pruner.skip_rank)
    with pruner(bench.model):
        right = greedy_answers(bench.model, bench.questions, BATCH)
    return {
        "kl": text.kl_mean,
        "kl_rows": text.kl_rows,
        "kept": asdict(kept(bench.right, bench.without, right)),
        "right": right,
        "need": bench.need,
        "realised_sparsity": text.mean_sparsity,
        "flops_reduction": cut,
        "schedule": list(pruner.scheduled.sparsity),
    }


def bench_of(settings: TrialStage) -> Bench:
    """The bench of these settings, made anew where the last one was another."""
    names = ("model", "dtype", "device", "revision", "data", "test_data", "test_split", "seed", "test_windows", "items")
    key = tuple(getattr(settings, name) for name in (*names, "prompt_tokens", "continuation_tokens"))
    if key not in _known:
        _known.clear()
        _known[key] = _make(settings)
    return _known[key]


def _make(settings: TrialStage) -> Bench:
    model, tokenizer = load_model(settings)
    text: dict[str, Any] = {"data": settings.test_data or settings.data, "split": settings.test_split}
    held_out = replace(settings, seed=settings.seed + OTHER_SEED, **text)
    windows = mixed_windows(held_out, tokenizer, settings.test_windows, 0.5)
    items = _items(held_out, tokenizer)
    check_questions(model.config, tokenizer, items)
    questions = [as_question(tokenizer, item) for item in items]
    deleted = [as_question(tokenizer, item, "context_deleted") for item in items]
    answers = (greedy_answers(model, asked, BATCH) for asked in (questions, deleted))
    return Bench(model, windows, teacher_logprobs(model, windows, BATCH), questions, *answers)


def _items(settings: TrialStage, tokenizer: Any) -> list[dict[str, Any]]:
    rng = random.Random(f"{settings.seed}/recall")
    with text_named(settings.data, settings.split):
        documents = load_documents(settings.data, settings.split)
        return recall_items(tokenizer, documents, rng, settings.items, settings.prompt_tokens)
