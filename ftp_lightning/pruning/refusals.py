"""What a forward cannot compute right while a pruner is attached: refused before anything has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.cache import RoutedLayer

if TYPE_CHECKING:
    from ftp_lightning.pruning.attached import Attached
    from ftp_lightning.pruning.forward import Forward

_SPOILED = "_half_a_step"


def spoil(cache, num_blocks: int) -> None:
    """An error has stopped a forward on this cache: mark it where some blocks have taken its tokens and others not."""
    layers = getattr(cache, "layers", [])
    for layer in layers:
        if isinstance(layer, RoutedLayer):
            layer.expected = None  # the announced keys do not come
    lengths = {layer.get_seq_length() for layer in layers} | ({0} if len(layers) < num_blocks else set())
    if len(lengths) > 1:
        setattr(cache, _SPOILED, True)


def check_cache(cache) -> None:
    """UserError for a cache that is not dynamic, or that an error has left unusable."""
    if cache is None:
        return
    if not hasattr(cache, "layers"):
        raise UserError(
            f"past_key_values is a {type(cache).__name__}, which is not a key-value cache of a decoder.\n"
            "Leave it out, or pass a DynamicCache."
        )
    offloaded = getattr(cache, "offloading", False)
    if getattr(cache, "is_compileable", False) or offloaded:
        raise UserError(
            f"token skipping needs a dynamic key-value cache; this one is {'offloaded' if offloaded else 'static'}.\n"
            "Leave `cache_implementation` unset."
        )
    if getattr(cache, _SPOILED, False):
        raise UserError(
            "an error stopped a forward on this cache half way: some blocks have seen its tokens, others not.\n"
            "Start with a new cache."
        )


def check_checkpointing(attached: Attached) -> None:
    """UserError where Hugging Face's gradient checkpointing would run the blocks of this forward again, and where this
    forward is a training one that a checkpoint runs again in backward, outside `TokenPruner.masked`."""
    trained = bool(attached.pruner.latest.told[2])
    if trained and attached.ambient.training is None and torch._C._current_graph_task_id() != -1:
        raise UserError(
            "backward runs this training forward again, and does so outside pruner.masked(...).\n"
            "Leave your checkpoint out, and use pruner.masked(..., recompute=True)."
        )
    for module in (attached.decoder, *attached.blocks):
        if getattr(module, "gradient_checkpointing", False) and module.training:
            raise UserError(
                "Hugging Face's gradient checkpointing runs blocks again in backward, where no pruner is in force.\n"
                "Call model.gradient_checkpointing_disable(), and use pruner.masked(..., recompute=True)."
            )


def check_router_logits(attached: Attached, arguments: dict, forward: Forward) -> None:
    """UserError where a mixture of experts is asked for router logits of all tokens and blocks would skip some."""
    asked = arguments.get("output_router_logits")
    if asked is None:
        asked = getattr(attached.decoder.config, "output_router_logits", False)
    skips = forward.ask is not None or bool(attached.pruner.removed)
    if not (asked and forward.active and skips):
        return
    if attached.ambient.generation is None:
        raise UserError(
            "router logits and the auxiliary loss of a mixture of experts are of all tokens, and a pruned forward "
            "computes some of them.\nLeave output_router_logits off, in the call and in the model's config."
        )
    arguments["output_router_logits"] = False  # generate makes no use of them
