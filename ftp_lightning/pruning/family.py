"""Where the blocks of a model are, and what is inside one. The only file that knows model families, and it goes by
structure."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.calls import uncompiled

CACHE = "past_key_values"
"""What transformers called the cache before 5.24; it is `cache` since then."""
CACHE_NAMES = (CACHE, "cache", "layer_past")
_UNDERSTOOD_LAYERS = {"full_attention", "sliding_attention"}
_UNDERSTOOD_ARGUMENTS = {
    "self", "hidden_states", "attention_mask", "position_embeddings", "position_ids", *CACHE_NAMES, "use_cache",
    "output_attentions", "output_router_logits", "encoder_hidden_states", "encoder_attention_mask", "cache_position",
    "shared_kv_states",
}  # fmt: skip
_BIASED_ATTENTION = {"alibi", "position_bias"}
_MASKS = {"attention_mask", "encoder_attention_mask"}
_REFUSED_ADAPTERS = {
    "PREFIX_TUNING": "fills the cache before the prompt, so that every forward would be a continuation",
    "CARTRIDGE": "fills the cache before the prompt, so that every forward would be a continuation",
    "XLORA": "weighs its adapters token by token, with weights that are not gathered",
}

_ADAPTER_REMEDY = "Understood are adapters of linear maps (LoRA, DoRA, IA3) and virtual tokens (prompt tuning)."


def find_decoder(model: nn.Module, check: bool = True) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the blocks, and the blocks; `check`: that each of them can be pruned (`check_block`).

    Looked for: an `nn.ModuleList` of as many modules as the config has hidden layers, whose members take
    `hidden_states`, a key-value cache, and hold an attention module with a `layer_idx` that attends through
    transformers' attention interface.

    Raises:
        UserError: nothing of this kind is in the model, or it does what gathered tokens cannot.
    """
    model = uncompiled(model)
    if not isinstance(model, nn.Module):
        raise UserError(f"a {type(model).__name__} is not a model.\nGive the pruner the model itself.")
    config = getattr(model, "config", None)
    _check_kind(model, config)
    count = getattr(config.get_text_config() if config is not None else None, "num_hidden_layers", None)
    if count is None:
        raise _refusal(model, "it has no config that tells how many decoder blocks (`num_hidden_layers`) to look for")
    for owner in model.modules():
        for child in owner.children():
            if isinstance(child, nn.ModuleList) and len(child) == count and all(map(_is_block, child)):
                if "inputs_embeds" not in _parameters(type(owner).forward):
                    raise _refusal(model, f"{type(owner).__name__}, which runs its blocks, takes no `inputs_embeds`")
                for index, block in enumerate(child if check else ()):
                    check_block(model, index, block)
                return owner, child
    if any(uncompiled(module) is not module for module in model.modules()):
        remedy = "Compile the whole model, `torch.compile(model)`, and give that or the model to the pruner."
        raise _refusal(model, "its decoder blocks are compiled one by one", remedy)
    raise _refusal(
        model,
        f"no nn.ModuleList of {count} decoder blocks that take `hidden_states` and a key-value cache and hold an "
        "attention module with `layer_idx` was found",
    )


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, first to last; UserError where the model has none that are understood."""
    return find_decoder(model)[1]


def heeds_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model, or what an adapter (peft) has wrapped, computes logits of the last positions alone where it is
    asked to; others hand the argument down with what they do not know, and read all positions."""
    base = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    return "logits_to_keep" in _parameters(type(base).forward)


@functools.cache
def _parameters(forward: Callable) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(forward).parameters


def _is_block(module: nn.Module) -> bool:
    names = _parameters(type(module).forward)
    return "hidden_states" in names and cache_name(module) is not None and _attention_or_none(module) is not None


def _refusal(model: nn.Module, problem: str, remedy: str = "") -> UserError:
    return UserError(f"{type(model).__name__} cannot be pruned: {problem}." + (remedy and f"\n{remedy}"))


def _check_kind(model: nn.Module, config) -> None:
    """UserError for a model that is no decoder alone, and for adapters that are more than a change of linear maps."""
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise _refusal(model, "its blocks read a second text through cross-attention; understood are decoders alone")
    for name, adapter in getattr(model, "peft_config", {}).items():
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        if kind in _REFUSED_ADAPTERS:
            raise _refusal(model, f"its adapter {name!r} ({kind}) {_REFUSED_ADAPTERS[kind]}", _ADAPTER_REMEDY)
    for module in model.modules():
        variants = module.__dict__.get("lora_variant") or {}
        if any(type(variant).__name__.startswith("ALora") for variant in variants.values()):
            problem = "its adapter (activated LoRA) starts at a token counted from the end of a row"
            raise _refusal(model, problem, _ADAPTER_REMEDY)


def check_block(model: nn.Module, index: int, block: nn.Module) -> None:
    """UserError where a block depends on more than hidden states, positions, and queries, keys, slots and a window."""
    problem = _problem(block, find_attention(block))
    if problem:
        raise _refusal(model, f"block {index}: {problem}")


def _problem(block: nn.Module, attention: nn.Module) -> str | None:
    arguments = {p.name for p in _parameters(type(block).forward).values() if p.kind != p.VAR_KEYWORD}
    code = inspect.unwrap(type(attention).forward).__code__
    if biases := arguments & _BIASED_ATTENTION:
        return f"it adds {', '.join(sorted(biases))} to the attention scores"
    idle = set() if getattr(block, "hidden_size_per_layer_input", 1) else {"per_layer_input"}
    if unknown := arguments - _UNDERSTOOD_ARGUMENTS - idle:
        return f"it takes {', '.join(sorted(unknown))}, which may go by token and is not understood"
    if wrapper := next((m for m in block.children() if _wraps(m, attention)), None):
        return f"its attention is inside a {type(wrapper).__name__} (peft), which attends to more than the text"
    if "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        name = type(attention).__name__
        return f"its {name} does not go through transformers' attention interface (ALL_ATTENTION_FUNCTIONS)"
    if getattr(attention, "is_causal", True) is False:
        return "its attention is not causal"
    if getattr(attention, "is_kv_shared_layer", False):
        return "it reads the keys and values of another block"
    if (kind := _layer_type(attention)) not in _UNDERSTOOD_LAYERS:
        return f"its layer type is {kind!r}, understood are {', '.join(sorted(_UNDERSTOOD_LAYERS))}"
    if getattr(attention, "sinks", None) is not None:
        return "its attention has learned sinks"
    if any(map(_scales_whole_calls, block.modules())):
        return (
            "its quantised linear maps scale a call's tokens together (torchao's weight-only and per-row ones do not)"
        )
    if "get_seq_length" in code.co_names:
        return "its attention counts positions by itself, which are others where tokens are skipped"
    if masks := {name for name in code.co_varnames if "mask" in name} - _MASKS:
        return f"its attention makes a mask of its own ({', '.join(sorted(masks))})"
    return None


def _wraps(module: nn.Module, attention: nn.Module) -> bool:
    return module is not attention and type(module).__module__.startswith("peft.") and attention in module.children()


def _scales_whole_calls(module: nn.Module) -> bool:
    """Whether a quantised linear map takes one scale from all tokens of a call: torch.ao's dynamic quantisation does,
    and torchao's with a granularity of PerTensor."""
    quantised = getattr(getattr(module, "weight", None), "act_quant_kwargs", None)
    granularity = type(getattr(quantised, "granularity", None)).__name__
    return type(module).__module__.startswith("torch.ao.nn.quantized") or granularity == "PerTensor"


def _layer_type(attention: nn.Module) -> str:
    kinds = getattr(attention.config, "layer_types", None)
    return kinds[attention.layer_idx] if kinds else "full_attention"


def cache_name(block: nn.Module) -> str | None:
    """The name under which a block's (or an attention's) forward takes the cache."""
    names = _parameters(type(block).forward)
    return next((name for name in CACHE_NAMES if name in names), None)


def cache_argument(model: nn.Module) -> str:
    """The name under which a whole model's forward takes the cache."""
    return cache_name(uncompiled(model)) or CACHE


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, under whichever of its names; None where there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def find_attention(block: nn.Module) -> nn.Module:
    """The attention module of a block."""
    attention = _attention_or_none(block)
    if attention is None:
        raise ValueError(f"{type(block).__name__} holds no attention module with `layer_idx` and `config`")
    return attention


def _attention_or_none(block: nn.Module) -> nn.Module | None:
    marks = {"layer_idx", "config"}
    return next((m for m in block.modules() if m is not block and marks <= m.__dict__.keys()), None)


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
    """Linear maps in a module; one that is wrapped by an adapter, or whose weight is packed, counts one."""
    if _is_linear(module):
        return 1
    own = sum(p.dim() == 2 for p in module.parameters(recurse=False))
    return own + sum(map(_matrices, module.children()))


def _is_linear(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, side, None), int) for side in ("in_features", "out_features"))


def _holds_experts(module: nn.Module) -> bool:
    return any(p.dim() == 3 for p in module.parameters())


def query_projection(attention: nn.Module) -> nn.Module | None:
    """The projection that makes queries alone; None where it is fused with keys and values, or not a linear map."""
    projection = getattr(attention, "q_proj", None)
    return projection if isinstance(projection, nn.Module) and _is_linear(projection) else None


def key_value_projections(attention: nn.Module) -> tuple[nn.Module, ...]:
    """The projections that make keys alone and values alone; empty where one is fused, missing or not a linear map."""
    found = [getattr(attention, name, None) for name in ("k_proj", "v_proj")]
    apart = all(isinstance(projection, nn.Module) and _is_linear(projection) for projection in found)
    return tuple(projection for projection in found if projection is not None) if apart else ()


@functools.cache
def _knows_sliding_blocks(module: str) -> bool:
    """Whether the code of a model, the module of its attention, tells blocks with a window from others."""
    try:
        return "sliding_attention" in inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):  # no source at hand
        return True


def sliding_window(attention: nn.Module) -> int | None:
    """How far back a query of this block sees, in tokens; None = all the way.

    `config.layer_types` is asked first where the stock model makes its masks by it: some families (EXAONE 4) carry a
    window in the attention of full blocks, too. Others (MiniMax, Mistral) know one mask for all, and whether
    `config.sliding_window` is set decides.
    """
    kinds = (
        getattr(attention.config, "layer_types", None) if _knows_sliding_blocks(type(attention).__module__) else None
    )
    is_full = kinds[attention.layer_idx] == "full_attention" if kinds else not getattr(attention, "is_sliding", True)
    if is_full:
        return None
    common = getattr(attention.config, "sliding_window", None)
    own = getattr(attention, "sliding_window", common)
    return common if own is None and kinds else own
