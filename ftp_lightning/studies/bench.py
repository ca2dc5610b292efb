"""What every run of a study is measured on: rows of held-out text, and questions that need the prompt."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ftp_lightning.data.choices import recall_items
from ftp_lightning.data.sources import load_documents
from ftp_lightning.data.task_names import OURS
from ftp_lightning.evaluation.bench import OWN_ANSWERS, TEXT, Bench
from ftp_lightning.evaluation.greedy import Questions
from ftp_lightning.evaluation.outcome import kept_cell
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.stages.inputs import check_questions, load_model, measured_rows, text_named

if TYPE_CHECKING:
    from ftp_lightning.studies.trial import TrialStage

BATCH, METHOD = 16, "trial"
RECALL = OURS[0]
OTHER_SEED = 1_000_003
"""Added to the seed, so that runs are not measured on the windows that their training was validated on [ours]."""


_known: dict[tuple, Bench] = {}
"""The last bench of this process: runs come seed by seed."""


def measure(settings: TrialStage, pruner: TokenPruner) -> dict[str, Any]:
    """KL per continuation token, with one mean per row; answers kept, with one verdict per question; what was
    skipped, and the share of the prompts' FLOPs that it saves."""
    bench = trial_bench(settings)
    items = bench.measure(METHOD, pruner, settings.seed)
    (name,), questions = bench.texts, items[items["task"] == RECALL]
    text, answers = bench.scores[METHOD, name, "prompt"], kept_cell(questions)
    return {
        "kl": text.kl_mean,
        "kl_rows": text.kl_rows,
        "kept": answers or {"share": None, "low": None, "high": None, "items": 0},
        "right": questions["right"].tolist(),
        "need": questions["needed"].tolist(),
        "documents": {"kl_rows": text.documents, "right": questions["document"].tolist()},
        "realised_sparsity": text.mean_sparsity,
        "flops_reduction": text.flops_cut,
        "schedule": list(pruner.scheduled.sparsity),
    }


def trial_bench(settings: TrialStage) -> Bench:
    """The bench of these settings, made anew where the last one was another."""
    names = ("model", "dtype", "device", "revision", "data", "test_data", "test_split", "seed", "test_windows", "items")
    key = tuple(getattr(settings, name) for name in (*names, "prompt_tokens", "continuation_tokens", "rows"))
    if key not in _known:
        _known.clear()
        _known[key] = _make(settings)
    return _known[key]


def _make(settings: TrialStage) -> Bench:
    model, tokenizer = load_model(settings)
    text: dict[str, Any] = {"data": settings.test_data or settings.data, "split": settings.test_split}
    held_out = replace(settings, seed=settings.seed + OTHER_SEED, **text)
    rows = measured_rows(held_out, model, tokenizer, settings.test_windows, 0.5)
    items = _items(held_out, tokenizer)
    check_questions(model.config, tokenizer, items)
    name = OWN_ANSWERS if settings.rows == "own_answers" else TEXT
    return Bench(model, {name: rows}, Questions(model, tokenizer, items, RECALL, BATCH), BATCH)


def _items(settings: TrialStage, tokenizer: Any) -> list[dict[str, Any]]:
    rng = random.Random(f"{settings.seed}/recall")
    with text_named(settings.data, settings.split):
        documents = load_documents(settings.data, settings.split)
        return recall_items(tokenizer, documents, rng, settings.items, settings.prompt_tokens)
