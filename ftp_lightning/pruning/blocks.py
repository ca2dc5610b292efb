"""Where the blocks of a model are, and what is inside one. The only file that knows model families, and it goes by
structure."""

from __future__ import annotations

import inspect

from torch import nn

_CACHE_NAMES = ("past_key_values", "layer_past")


def find_decoder(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the blocks, and the blocks.

    Looked for: an `nn.ModuleList` of as many modules as the config has hidden layers, whose members take
    `hidden_states`, a key-value cache, and hold an attention module with a `layer_idx`.

    Raises:
        ValueError: nothing of this kind is in the model.
    """
    config = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    for owner in model.modules():
        for child in owner.children():
            if isinstance(child, nn.ModuleList) and len(child) == count and all(map(_is_block, child)):
                return owner, child
    raise ValueError(
        f"{type(model).__name__} cannot be pruned: no nn.ModuleList of {count} decoder blocks that take "
        "`hidden_states` and a key-value cache and hold an attention module with `layer_idx` was found"
    )


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, first to last; ValueError where the model has none that are understood."""
    return find_decoder(model)[1]


def _is_block(module: nn.Module) -> bool:
    names = inspect.signature(module.forward).parameters
    return "hidden_states" in names and cache_name(module) is not None and _attention_or_none(module) is not None


def cache_name(block: nn.Module) -> str | None:
    """The name under which the block's forward takes the cache."""
    names = inspect.signature(type(block).forward).parameters
    return next((name for name in _CACHE_NAMES if name in names), None)


def find_attention(block: nn.Module) -> nn.Module:
    """The attention module of a block."""
    attention = _attention_or_none(block)
    if attention is None:
        raise ValueError(f"{type(block).__name__} holds no attention module with `layer_idx` and `config`")
    return attention


def _attention_or_none(block: nn.Module) -> nn.Module | None:
    return next(
        (m for m in block.modules() if m is not block and hasattr(m, "layer_idx") and hasattr(m, "config")), None
    )


def query_projection(attention: nn.Module) -> nn.Module | None:
    """The projection that makes queries alone; None where it is fused with keys and values."""
    projection = getattr(attention, "q_proj", None)
    return projection if isinstance(projection, nn.Module) else None


def sliding_window(attention: nn.Module) -> int | None:
    """How far back a query of this block sees, in tokens; None = all the way."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    kinds = getattr(attention.config, "layer_types", None)
    if kinds and kinds[attention.layer_idx] != "sliding_attention":
        return None
    return getattr(attention.config, "sliding_window", None)
