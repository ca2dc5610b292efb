"""A story whose tokens show how many blocks computed them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ftp_lightning.cli.settings import StageSettings
from ftp_lightning.data.sources import load_documents
from ftp_lightning.data.stories import SPLITS, load_stories
from ftp_lightning.data.text import prompt_ids
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.pruning.devices import home


@torch.no_grad()
def story_tokens(settings: StageSettings, model: Any, tokenizer: Any, pruner: TokenPruner) -> dict[str, Any]:
    """The beginning of the first story as a routed prompt: its tokens, the blocks that computed each, all decisions.

    Returns {"title", "tokens" (T texts), "computed_by" (T counts), "keep" (N rows of T zeros and ones), "num_blocks"}.
    """
    title, text = _first_text(settings)
    ids = prompt_ids(tokenizer, text)[: settings.prompt_tokens]
    with pruner(model):
        model(input_ids=torch.tensor([ids], device=home(model)), use_cache=True, logits_to_keep=1)
    keep = torch.cat(pruner.trace.routed.keep).int()
    return {
        "title": title,
        "tokens": [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids],
        "computed_by": keep.sum(0).tolist(),
        "keep": keep.tolist(),
        "num_blocks": len(keep),
    }


def pruner_images(
    settings: StageSettings, model: Any, tokenizer: Any, pruner: TokenPruner, realised: Sequence[float] | None = None
) -> dict[str, Callable[[], bytes]]:
    """Name -> what draws the PNG: the schedule, and the gates on the beginning of the stage's text."""
    from ftp_lightning.report import tracked

    return {
        "schedule": lambda: tracked.schedule_png(pruner.scheduled.sparsity, realised, pruner.kv),
        "gates": lambda: tracked.gates_png(story_tokens(settings, model, tokenizer, pruner)["keep"]),
    }


def _first_text(settings: StageSettings) -> tuple[str, str]:
    if settings.data == "embedded" and settings.chosen_split in SPLITS:
        story = load_stories(settings.chosen_split)[0]
        return story.title, story.text
    return "The text's beginning", load_documents(settings.data, settings.chosen_split)[0]
