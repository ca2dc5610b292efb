"""Attention of gathered queries over the keys they may see, beside every backend; never a T x T mask in one piece.

Shapes: B rows, H query heads, G = key heads, Q queries, S keys, D head size.

A block's attention module gets a copy of its config that names our attention function (`tap_attention`). That function
hands queries and keys to the pruner in force; the model's own config, and hence its own masks, stay as they are.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    eager_mask,
    flash_attention_mask,
    flex_attention_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.kept import Tokens, visible_keys

if TYPE_CHECKING:
    from ftp_lightning.pruning.plan import BlockPlan

TAP = "ftp_lightning_tap"
QUERY_CHUNK = {"cpu": 64}
"""Queries whose mask is made at once, by device [ours]: keys that the chunk cannot see are left out. Small chunks leave
out more; on an accelerator each one is a launch."""
LARGEST_CHUNK = 512
FLEX_NEVER = {"cpu"}
"""Devices whose flex attention is not used."""
_MASK_KINDS = {sdpa_mask: "bool", eager_mask: "additive", flash_attention_mask: "none", flex_attention_mask: "none"}
_CHANGING = {
    "s_aux", "position_bias", "alibi", "head_mask", "score_mask", "score_mod", "block_mask", "cache", "block_table",
    "k_cache", "v_cache", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens_q", "cu_seqlens_k", "max_length_q",
    "max_length_k", "use_top_left_mask", "query_length",
}  # fmt: skip
"""Keywords by which transformers' attention functions change what they compute, beyond what is understood here."""
_UNDERSTOOD = {
    "module", "query", "key", "value", "attention_mask", "kwargs", "dropout", "scaling", "is_causal", "sliding_window",
    "softcap",
}  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """How a model attends: the name of its implementation, and which masks that takes.

    mask: "bool" (SDPA and what is registered like it), "additive" (eager), or "none" (FlashAttention, flex attention):
    it takes no mask as a tensor, so that where one is needed SDPA attends instead (eager, where logits are
    soft-capped). Flex attention gets a block mask (`flex.block_mask`) on an accelerator.
    foreign: it is someone's own function, which may read anything.
    changing: arguments by which it would attend in a way that is not understood here.
    """

    name: str
    mask: str
    foreign: bool
    changing: frozenset[str]

    @staticmethod
    def of(attention: nn.Module) -> Backend:
        """UserError where the attention implementation's masks are not known."""
        name = attention.config._attn_implementation
        make = ALL_MASK_ATTENTION_FUNCTIONS.get(name) if name in ALL_MASK_ATTENTION_FUNCTIONS else None
        if make not in _MASK_KINDS or name.startswith("paged"):
            raise UserError(
                f"attention implementation {name!r} cannot be pruned: the masks it takes are not known.\n"
                "Load the model with attn_implementation='sdpa', 'eager' or 'flash_attention_2'."
            )
        named = frozenset(inspect.signature(interface(name, attention)).parameters)
        mask = _MASK_KINDS[make]
        return Backend(name, mask, mask == "bool" and name != "sdpa", (named | _CHANGING) - _UNDERSTOOD)


@dataclass(frozen=True)
class Sight:
    """Which keys the queries of the attention about to run may see: those of earlier slots within `window`.

    `new` is the number of keys that this forward brings; `causal`: queries are the keys, in order; `everything`: there
    is one query and it sees all keys. Both spare the mask, and hold only where all tokens are valid and within the
    window. `themselves`: every query sees its own key (queries and keys are the same slots), valid or not. `complete`:
    keys are all slots up to the last one, in order. `real`, `key_gates`: where training lets gradients through the keys
    (`key_gates`), which keys are no padding and their gates, (B, S).
    """

    queries: Tokens
    keys: Tokens
    window: int | None = None
    new: int = 0
    causal: bool = False
    everything: bool = False
    themselves: bool = False
    complete: bool = False
    real: Tensor | None = None
    key_gates: Tensor | None = None

    def reachable(self, start: int, stop: int) -> Tensor:
        """(B, 1, q, S) bool: keys of other tokens that queries start:stop would see, if all real ones were kept."""
        slots, keys = self.queries.slots[:, start:stop], Tokens(self.keys.slots, self.real, False)
        return (visible_keys(slots, keys, self.window) & (slots[:, :, None] != keys.slots[:, None, :]))[:, None]

    def mask(self, start: int, stop: int, low: int, high: int) -> Tensor:
        """(B, 1, q, s) bool for queries start:stop and keys low:high."""
        slots = self.queries.slots[:, start:stop]
        keys = Tokens(self.keys.slots[:, low:high], self.keys.valid[:, low:high], self.keys.all_valid)
        visible = visible_keys(slots, keys, self.window)
        if self.themselves:
            visible = visible | (slots[:, :, None] == keys.slots[:, None, :])
        elif not (self.keys.all_valid and self.queries.all_valid):  # a filler must see something; its output is dropped
            visible = visible | ~visible.any(-1, keepdim=True)
        return visible[:, None]

    def key_range(self, start: int, stop: int) -> tuple[int, int]:
        """Keys outside [low, high) are hidden from queries start:stop; known on the host, for all devices.

        The k-th query from the end has k later ones above it, so its slot is at most `span - k`: it sees none of the
        last k keys. On a CPU the slots themselves are at hand.
        """
        queries, keys = self.queries.slots.shape[1], self.keys.slots.shape[1]
        low, high = 0, min(keys, keys - queries + stop)
        if self.complete and self.queries.slots.device.type == "cpu" and not torch.compiler.is_compiling():
            offset = int(self.keys.slots[0, 0])
            high = min(high, int(self.queries.slots[:, stop - 1].max()) + 1 - offset)
        if self.window is not None and self.keys.all_valid and self.queries.all_valid:
            low = max(0, keys - self.new + start - self.window + 1)
        return low, max(high, low + 1)


def attend(
    plan: BlockPlan, sight: Sight, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict
) -> tuple[Tensor, Tensor | None]:
    """Attention of queries (B, H, Q, D) over keys and values (B, G, S, D), as the block's backend computes it.

    Returns (B, Q, H, D) and the weights (B, H, Q, S) where the backend gives them (eager).
    """
    backend, stock = plan.site.backend, plan.stock
    if backend.foreign or not backend.changing.isdisjoint(kwargs):
        _check_arguments(backend, module, kwargs)
    flex = backend.name == "flex_attention"
    if sight.everything and flex and query.device.type in FLEX_NEVER:
        name = "sdpa" if kwargs.get("softcap") is None else "eager"
        return interface(name, module)(module, query, key, value, None, **kwargs)
    if sight.everything or (sight.causal and backend.mask != "additive" and not flex):
        return stock(module, query, key, value, None, **kwargs)
    if flex and _flexes(query, kwargs):
        from ftp_lightning.pruning.flex import block_mask  # needs torch's compiler, which takes its time to import

        return stock(module, query, key, value, block_mask(sight), **kwargs)
    if backend.mask == "additive" or (backend.mask == "none" and kwargs.get("softcap") is not None):
        mask = _additive(sight.mask(0, query.shape[2], 0, key.shape[2]), query.dtype)
        return interface("eager", module)(module, query, key, value, mask, **kwargs)
    if backend.foreign:  # one mask, as it expects
        mask = sight.mask(0, query.shape[2], 0, key.shape[2])
        return stock(module, query, key, value, mask, **kwargs)
    return _chunked_sdpa(sight, query, key, value, kwargs.get("scaling"), kwargs.get("dropout", 0.0)), None


def _flexes(query: Tensor, kwargs: dict) -> bool:
    """Whether flex attention takes these queries: it knows no dropout, and one query is not worth a block mask.

    On a CPU it has no gradient, and what torch 2.13 compiles for lengths that change is not always right: SDPA there.
    """
    return query.shape[2] > 1 and not kwargs.get("dropout") and query.device.type not in FLEX_NEVER


def _chunked_sdpa(sight: Sight, query: Tensor, key: Tensor, value: Tensor, scale, dropout: float) -> Tensor:
    """SDPA chunk by chunk, each over the keys it can see; (B, Q, H, D)."""
    heads, groups = query.shape[1], key.shape[1]
    if heads != groups and key.device.type != "cpu":  # masked GQA falls back to the slow kernel elsewhere
        key, value = (x.repeat_interleave(heads // groups, dim=1) for x in (key, value))
    size, parts = QUERY_CHUNK.get(query.device.type, LARGEST_CHUNK), []
    for start in range(0, query.shape[2], size):
        stop = min(start + size, query.shape[2])
        low, high = sight.key_range(start, stop)
        part = F.scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, low:high],
            value[:, :, low:high],
            attn_mask=sight.mask(start, stop, low, high),
            dropout_p=dropout,
            scale=scale,
            enable_gqa=heads != key.shape[1],
        )
        parts.append(part.transpose(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)


def _check_arguments(backend: Backend, module: nn.Module, kwargs: dict) -> None:
    """UserError for an argument that changes attention in a way gathered tokens do not know.

    transformers hands down whatever the model was called with (`generate`'s own arguments too). What the attention
    function does not name, and what is not known to change attention, it passes over, and so do we.
    """
    strange = [name for name, value in kwargs.items() if value is not None and name in backend.changing]
    if backend.foreign:  # a tensor may go by token
        unknown = kwargs.keys() - _UNDERSTOOD - set(strange)
        strange += [name for name in kwargs if name in unknown and isinstance(kwargs[name], Tensor)]
    if strange:
        raise UserError(
            f"{type(module).__name__} attends with {', '.join(strange)}, which is not understood: this model cannot be "
            "pruned."
        )


def interface(name: str, module: nn.Module) -> Callable:
    """The attention function of this name; eager is the one that stands beside the module's class."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def tap_attention(attention: nn.Module, run: Callable, copies: dict | None = None) -> Callable[[], None]:
    """Let `run(module, query, key, value, mask, kwargs)` attend in place of the module's attention function.

    copies: of configs, by their identity: blocks that share one share the copy. Returns the function that undoes it.
    """
    if TAP not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(TAP, _tapped_attention)
    original, before = attention.config, getattr(attention, "_ftp_tap", None)
    copies = {} if copies is None else copies
    if before is None and id(original) not in copies:
        copies[id(original)] = copy.copy(original)
        copies[id(original)]._attn_implementation_internal = TAP
    attention.config = copies[id(original)] if before is None else original
    attention._ftp_tap = run
    return functools.partial(_untap, attention, original, before)  # no closure: a copied model has its own


def _untap(attention: nn.Module, original, before: Callable | None) -> None:
    attention.config = original
    if before is None:
        del attention._ftp_tap
    else:
        attention._ftp_tap = before


def _tapped_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    tap = module.__dict__.get("_ftp_tap")
    if tap is None:  # another thread has taken it off since the module read its config
        stock = interface(module.config._attn_implementation, module)
        return stock(module, query, key, value, attention_mask, **kwargs)
    return tap(module, query, key, value, attention_mask, kwargs)
