"""Where the blocks of a model are, and what is inside one. The only file that knows model families, and it goes by
structure."""

from __future__ import annotations

import inspect

from torch import nn

_CACHE_NAMES = ("past_key_values", "layer_past")
_UNDERSTOOD_LAYERS = {"full_attention", "sliding_attention"}
_BIASED_ATTENTION = {"alibi", "position_bias"}


def find_decoder(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the blocks, and the blocks.

    Looked for: an `nn.ModuleList` of as many modules as the config has hidden layers, whose members take
    `hidden_states`, a key-value cache, and hold an attention module with a `layer_idx` that attends through
    transformers' attention interface.

    Raises:
        ValueError: nothing of this kind is in the model, or its attention does what gathered tokens cannot.
    """
    config = getattr(model, "config", None)
    count = getattr(config.get_text_config() if config is not None else None, "num_hidden_layers", None)
    for owner in model.modules():
        for child in owner.children():
            if isinstance(child, nn.ModuleList) and len(child) == count and all(map(_is_block, child)):
                _check_attention(model, child)
                return owner, child
    raise ValueError(
        f"{type(model).__name__} cannot be pruned: no nn.ModuleList of {count} decoder blocks that take "
        "`hidden_states` and a key-value cache and hold an attention module with `layer_idx` was found"
    )


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, first to last; ValueError where the model has none that are understood."""
    return find_decoder(model)[1]


def _is_block(module: nn.Module) -> bool:
    names = inspect.signature(type(module).forward).parameters
    return "hidden_states" in names and cache_name(module) is not None and _attention_or_none(module) is not None


def _check_attention(model: nn.Module, blocks: nn.ModuleList) -> None:
    """ValueError where the attention of a block depends on more than queries, keys, slots and a window."""
    for index, block in enumerate(blocks):
        attention, names = find_attention(block), set(inspect.signature(type(block).forward).parameters)
        problem = None
        if names & _BIASED_ATTENTION:
            problem = f"it adds {', '.join(names & _BIASED_ATTENTION)} to the attention scores"
        elif "ALL_ATTENTION_FUNCTIONS" not in inspect.unwrap(type(attention).forward).__code__.co_names:
            problem = "its attention does not go through transformers' attention interface (ALL_ATTENTION_FUNCTIONS)"
        elif getattr(attention, "is_causal", True) is False:
            problem = "its attention is not causal"
        elif getattr(attention, "is_kv_shared_layer", False):
            problem = "it reads the keys and values of another block"
        elif (kind := _layer_type(attention)) not in _UNDERSTOOD_LAYERS:
            problem = f"its layer type is {kind!r}, understood are {', '.join(sorted(_UNDERSTOOD_LAYERS))}"
        elif getattr(attention, "sinks", None) is not None:
            problem = "its attention has learned sinks"
        if problem:
            raise ValueError(f"{type(model).__name__} cannot be pruned: block {index}: {problem}")


def _layer_type(attention: nn.Module) -> str:
    kinds = getattr(attention.config, "layer_types", None)
    return kinds[attention.layer_idx] if kinds else "full_attention"


def cache_name(block: nn.Module) -> str | None:
    """The name under which a block's (or an attention's) forward takes the cache."""
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


def find_mlp(block: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The modules through which tokens enter and leave the feed-forward part; one and the same where it is a module.

    Looked for among the block's children but for its attention: one that holds at least two weight matrices (a mixture
    of experts included), else two that are one each (OPT's `fc1`, `fc2`). None where neither is there.
    """
    attention = find_attention(block)
    children = [child for child in block.children() if child is not attention]
    whole = [child for child in children if _matrices(child) >= 2 or _holds_experts(child)]
    if len(whole) == 1:
        return whole[0], whole[0]
    single = [child for child in children if _matrices(child) == 1]
    return (single[0], single[1]) if not whole and len(single) == 2 else None


def _matrices(module: nn.Module) -> int:
    return sum(p.dim() == 2 for p in module.parameters())


def _holds_experts(module: nn.Module) -> bool:
    return any(p.dim() == 3 for p in module.parameters())


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
