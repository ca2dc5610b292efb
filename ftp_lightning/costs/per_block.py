"""What one block costs, read off its structure: FLOPs per token and per pair, bytes per cached token and decode step.

A multiply-add counts two. Norms, activations, rotary embedding and the pruner's router are left out (below 1 % of a
block). Pairs are those a causal mask lets through, i.e. a triangle: kernels that compute the whole rectangle and hide
half of it do, and torch's FLOP counter counts, nearly twice as many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ftp_lightning.costs.stored import stored_bytes
from ftp_lightning.pruning.family import find_attention, find_blocks, query_projection, sliding_window

_OUTPUT_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo")


@dataclass(frozen=True)
class BlockCost:
    """Costs of one block.

    Attributes:
        keys_values: FLOPs per token of the projections that run also for a skipped token under kv="keep": keys and
            values, with the queries where the three are one fused projection.
        attention: FLOPs per token of the attention's other linear maps (queries, output).
        mlp: FLOPs per token of all other linear maps; of experts, those that a token uses.
        pair: FLOPs per visible (query, key) pair, 2 * heads * (key size + value size).
        cached_bytes: bytes of one cached token.
        window: how many tokens back a query sees, itself included; None = all the way.
        weight_bytes, deposit_bytes: bytes of weights read to compute one token, and of the projections in
            `keys_values` alone.
        skip, skip_bytes: FLOPs of one token that skips the block (or a part of it), and bytes of weights read for it:
            4 r D and those of 2 r D numbers under a compensation of rank r, 0 for the identity. What a bias costs, and
            hence the mean update, is left out.
    """

    keys_values: float
    attention: float
    mlp: float
    pair: float
    cached_bytes: int
    window: int | None = None
    weight_bytes: float = 0.0
    deposit_bytes: float = 0.0
    skip: float = 0.0
    skip_bytes: float = 0.0

    @property
    def other(self) -> float:
        """FLOPs per token of all linear maps but `keys_values`."""
        return self.attention + self.mlp


def block_costs(model: nn.Module, rank: int = 0) -> list[BlockCost]:
    """Costs of each block, counted from the weights of its linear maps (2 FLOPs per weight and token); `rank` that of
    what skipped tokens are multiplied with (`TokenPruner.skip_rank`)."""
    width, numbers = _cache_width(model), 2 * rank * model.config.get_text_config().hidden_size
    return [_block_cost(block, width, numbers) for block in find_blocks(model)]


def remaining_costs(costs: Sequence[BlockCost], removed: Iterable[tuple[int, str]]) -> list[BlockCost]:
    """Costs of what is left where parts (block, "attention" or "mlp") are removed for every token."""
    gone: dict[str, dict[str, Any]] = {
        "attention": {"keys_values": 0.0, "attention": 0.0, "pair": 0.0, "cached_bytes": 0},
        "mlp": {"mlp": 0.0},
    }
    left = list(costs)
    for block, part in removed:
        left[block] = replace(left[block], **gone[part])
    return left


def _block_cost(block: nn.Module, width: int, skip: int) -> BlockCost:
    attention = find_attention(block)
    depositing = [child for name, child in attention.named_children() if _is_deposit(name, child, attention)]
    keys_values = 2.0 * sum(map(_weights, depositing))
    inside = 2.0 * _weights(attention)
    heads, cached, key_size, value_size = _head_shape(attention)
    return BlockCost(
        keys_values=keys_values,
        attention=inside - keys_values,
        mlp=2.0 * _weights(block) - inside,
        pair=2.0 * heads * (key_size + value_size),
        cached_bytes=cached * width,
        window=sliding_window(attention),
        weight_bytes=_bytes(block),
        deposit_bytes=sum(map(_bytes, depositing)),
        skip=2.0 * skip,
        skip_bytes=float(skip * width),
    )


def _is_deposit(name: str, child: nn.Module, attention: nn.Module) -> bool:
    """Whether a child of the attention runs for a token that only leaves its key and value: all linear maps before the
    cache do, but a query projection of its own."""
    return child is not query_projection(attention) and name not in _OUTPUT_NAMES


def _weights(module: nn.Module) -> float:
    """Weights that a token meets in the linear maps of a module: all of the dense ones, of experts the chosen share.

    Of wrappers (adapters around a linear map) the innermost maps are counted, each once: base, and both factors of the
    adapters that are in use.
    """
    dense = sum(_linear_size(part) for part in _linear_maps(module))
    return dense + sum(weight.numel() * share for weight, share in _experts(module))


def _linear_maps(module: nn.Module) -> Iterator[nn.Module]:
    for part in _in_use(module):
        if _linear_size(part) and not any(_linear_size(inner) for inner in part.modules() if inner is not part):
            yield part


def _in_use(module: nn.Module) -> Iterator[nn.Module]:
    """All modules inside but those of adapters (peft) that are switched off, or merged into the weights."""
    yield module
    active = getattr(module, "active_adapters", None) if hasattr(module, "base_layer") else None
    off = active is not None and (getattr(module, "merged", False) or getattr(module, "disable_adapters", False))
    for child in module.children():
        if active is None or not isinstance(child, nn.ModuleDict):
            yield from _in_use(child)
        else:
            for name in () if off else child.keys() & set(active):
                yield from _in_use(child[name])


def _linear_size(module: nn.Module) -> int:
    """Logical weights of a linear map (a quantised weight may be packed); 0 for any other module."""
    inner, outer = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inner, int) and isinstance(outer, int):
        return inner * outer
    weight: Any = getattr(module, "weight", None)
    is_map = isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)
    return weight.numel() if is_map else 0


def _experts(module: nn.Module) -> Iterator[tuple[Tensor, float]]:
    """Weights (experts, a, b) of a mixture, and the share of the experts that a token uses: top_k / experts.

    top_k is that of the mixture's router; where no module tells it, every expert is counted.
    """
    chosen = next((part.top_k for part in module.modules() if isinstance(getattr(part, "top_k", None), int)), None)
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            if weight.dim() == 3:
                yield weight, 1.0 if chosen is None else min(1.0, chosen / weight.shape[0])


def _head_shape(attention: nn.Module) -> tuple[int, int, int, int]:
    """(query heads, numbers cached per token, key size, value size) of an attention.

    Cached are a key and a value per key head; where one projection compresses both (latent attention), what it gives.
    """
    config = attention.config
    heads = config.num_attention_heads
    key_size = _first(attention, ("qk_head_dim", "head_dim", "head_size")) or config.hidden_size // heads
    value_size = _first(attention, ("v_head_dim",)) or key_size
    projected = getattr(getattr(attention, "k_proj", None), "out_features", None)
    key_heads = projected // key_size if projected else getattr(config, "num_key_value_heads", None) or heads
    latent = getattr(getattr(attention, "kv_a_proj_with_mqa", None), "out_features", None)
    return heads, latent or key_heads * (key_size + value_size), key_size, value_size


def _first(module: nn.Module, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(module, name, None))), None)


def _bytes(module: nn.Module) -> float:
    """Bytes of weights that are read to compute one token: as they are stored, of experts the chosen share."""
    experts = {id(weight): share for weight, share in _experts(module)}
    weights = sum(stored_bytes(weight) * experts.get(id(weight), 1.0) for weight in module.parameters())
    packed = (buffer for part in _linear_maps(module) for buffer in part.buffers(recurse=False))
    return weights + sum(map(stored_bytes, packed))


def _cache_width(model: nn.Module) -> int:
    """Bytes of one cached number: the model computes keys and values in its own dtype."""
    dtype = getattr(model, "dtype", None)
    return torch.empty((), dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32).element_size()


# ---------------------------------------------------------------- visible pairs


def causal_pairs(queries: int, keys: int, window: int | None = None) -> float:
    """Visible pairs of `queries` tokens spread evenly over `keys`, a query seeing `window` tokens, itself included.

    The q-th of K queries sees about min(q * n / K, w) of n keys [ours], so with m = min(K, floor(w * K / n)) it is

        n / K * m * (m + 1) / 2 + (K - m) * w,

    exact where K divides n; for K = n it is the causal square, m * (m + 1) / 2 + (n - m) * w with m = min(n, w).
    """
    if not queries:
        return 0.0
    rising = queries if window is None else min(queries, window * queries // keys)
    return keys / queries * rising * (rising + 1) / 2.0 + (queries - rising) * (window or 0)


def evicted_pairs(kept: int, tokens: int, window: int | None = None) -> float:
    """Visible pairs among `kept` tokens spread evenly over `tokens`, of which the others left no key.

    Distance is that of the original positions, so a window w holds ceil(w * K / n) kept tokens [ours]; exact where K
    divides n.
    """
    return causal_pairs(kept, kept, None if window is None or not kept else -(-window * kept // tokens))


def continued_pairs(before: int, stored: float, new: int, window: int | None = None) -> float:
    """Visible pairs of `new` tokens after `before`, of which `stored`, spread evenly, left a key.

    The j-th new token sees min(j, w) new ones and stored * min(n, max(0, w - j)) / n of the n before; without a window
    stored + j.
    """
    if window is None:
        return new * stored + new * (new + 1) / 2.0
    share = stored / before if before else 0.0
    return float(sum(min(j, window) + share * min(before, max(0, window - j)) for j in range(1, new + 1)))
