"""What is known of a block before anything runs: where its parts are, how it is called, how it attends."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ftp_lightning.pruning.attention import Backend
from ftp_lightning.pruning.calls import Signature
from ftp_lightning.pruning.devices import hooked_place
from ftp_lightning.pruning.family import (
    cache_name,
    check_block,
    find_attention,
    find_mlp,
    key_value_projections,
    query_projection,
    sliding_window,
)


@dataclass(frozen=True)
class Site:
    """A block as a pruner sees it.

    Attributes:
        block, attends: how the block and its attention are called.
        attention: the attention module.
        mlp: where tokens enter and leave the feed-forward part; None where it is not understood.
        query: the projection that makes queries alone; None where it is fused with others.
        key_value: those that make keys and values alone; empty where they are fused.
        window: how far back a query sees; None = all the way.
        backend: the attention implementation.
        place: the device that the hooks of a dispatched model bring its arguments to; None without hooks.
    """

    block: Signature
    attention: nn.Module
    attends: Signature
    mlp: tuple[nn.Module, nn.Module] | None
    query: nn.Module | None
    key_value: tuple[nn.Module, ...]
    window: int | None
    backend: Backend
    place: torch.device | None = None

    @staticmethod
    def of(block: nn.Module) -> Site:
        """UserError where the block's attention implementation wants masks that are not made here."""
        attention = find_attention(block)
        return Site(
            signature_of(block),
            attention,
            signature_of(attention),
            find_mlp(block),
            query_projection(attention),
            key_value_projections(attention),
            sliding_window(attention),
            Backend.of(attention),
            hooked_place(block),
        )


_SIGNATURES: dict[type[nn.Module], Signature] = {}


def signature_of(module: nn.Module) -> Signature:
    """How a block or an attention is called; looked up once for its class."""
    kind = type(module)
    if kind not in _SIGNATURES:
        _SIGNATURES[kind] = Signature(kind, cache_name(module))
    return _SIGNATURES[kind]


_KNOWN: WeakKeyDictionary[nn.Module, tuple[tuple, Site]] = WeakKeyDictionary()


def sites_of(model: nn.Module, blocks: nn.ModuleList) -> list[Site]:
    """What is known of each block. UserError where the model cannot be pruned.

    A block is looked at once: a training step attaches a pruner each time. What was found holds while the block has the
    same modules, weights, hooks and attention implementation.
    """
    sites: list[Site] = []
    for index, block in enumerate(blocks):
        state, known = _state_of(block), _KNOWN.get(block)
        if known is None or known[0] != state:
            check_block(model, index, block)
            known = _KNOWN[block] = state, Site.of(block)
        sites.append(known[1])
    return sites


def _state_of(block: nn.Module) -> tuple:
    modules = tuple(block.modules())
    hooked = tuple(id(module) for module in modules if "_hf_hook" in module.__dict__)
    config = next((module.config for module in modules if "config" in module.__dict__), None)
    attends = getattr(config, "__dict__", {}).get("_attn_implementation_internal")
    weights = (id(weight) for module in modules for weight in module._parameters.values())
    return (*map(id, modules), *weights, hooked, attends)
