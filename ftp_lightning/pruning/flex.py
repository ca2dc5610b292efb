"""Gathered tokens under flex attention: the block mask, made from the slots of queries and keys.

    visible(i, j)  =  slot_j <= slot_i  and  slot_j > slot_i - window  and  key j is valid

Slots ascend, so the least and the greatest slot of a tile of queries and of a tile of keys say whether the tile is
empty (its keys all come later), full (all come earlier) or partial; only partial tiles ask `visible` pair by pair.
https://pytorch.org/docs/stable/nn.attention.flex_attention.html
Shapes: B rows, Q queries, S keys; q = ceil(Q / TILE) and s = ceil(S / TILE) tiles. No Q x S mask is made, and nothing
is asked of the device.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

if TYPE_CHECKING:
    from ftp_lightning.pruning.attention import Sight
    from ftp_lightning.pruning.kept import Tokens

TILE = 128
"""Queries and keys of a tile, flex attention's own default."""
_BEYOND = 2**40
"""More than any slot, and exact as the float that `pad` makes of it."""
_MORE: dict = (
    {"compute_q_blocks": False} if "compute_q_blocks" in signature(BlockMask.from_kv_blocks).parameters else {}
)
"""Without a gradient: no lists that the backward alone reads, where torch (2.9 on) can do without."""


def block_mask(sight: Sight) -> BlockMask:
    """Which tiles of keys each tile of queries looks at, and the rule inside a partial one.

    Rows without a visible key (fillers, padding) are computed as 0; what they hold is dropped.
    """
    queries, keys, window = sight.queries, sight.keys, sight.window
    first_query, last_query = _ends(queries)
    first_key, last_key = _ends(keys)
    first_query, last_query = first_query[:, :, None], last_query[:, :, None]
    seen = first_key[:, None] <= last_query
    full = (last_key[:, None] <= first_query) & _whole(keys)[:, None]
    if window is not None:
        seen = seen & (last_key[:, None] > first_query - window)
        full = full & (first_key[:, None] > last_query - window)
    query_slots, key_slots, valid = queries.slots, keys.slots, keys.valid
    # one form for all blocks and calls, numbers as tensors: each other form would be compiled on its own
    reach = query_slots.new_full((), _BEYOND if window is None else window)
    itself = valid.new_full((), sight.themselves)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own, other = query_slots[row, query], key_slots[row, key]
        return ((other <= own) & (other > own - reach) & valid[row, key]) | (itself & (own == other))

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~full),
        *_listed(full),
        BLOCK_SIZE=TILE,
        mask_mod=visible,
        seq_lengths=(query_slots.shape[1], key_slots.shape[1]),
        **_MORE if not torch.is_grad_enabled() else {},
    )


def _ends(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """(B, tiles) each: the least and the greatest slot of a tile."""
    slots, missing = tokens.slots, -tokens.slots.shape[1] % TILE
    low = F.pad(slots, (0, missing), value=_BEYOND)
    high = F.pad(slots, (0, missing), value=-1)
    return low.unflatten(1, (-1, TILE)).amin(-1), high.unflatten(1, (-1, TILE)).amax(-1)


def _whole(tokens: Tokens) -> Tensor:
    """(B, tiles) bool: the tile has TILE keys, and all are valid."""
    rows, count = tokens.slots.shape
    valid = tokens.slots.new_ones((rows, count), dtype=torch.bool) if tokens.all_valid else tokens.valid
    return F.pad(valid, (0, -count % TILE), value=False).unflatten(1, (-1, TILE)).all(-1)


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """tiles (B, q, s) bool as flex attention wants them: how many (B, 1, q), and which come first (B, 1, q, s)."""
    order = tiles.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    return tiles.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()
