"""Attention masks from slots: what a gathered query may see."""

from __future__ import annotations

import torch
from torch import Tensor

from ftp_lightning.pruning.attention import Tokens, visible_keys
from ftp_lightning.pruning.state import Pass, Site


def attention_mask(
    site: Site, state: Pass, queries: Tokens, keys: Tokens, dtype: torch.dtype, themselves: bool = False
) -> Tensor | None:
    """(B, 1, Q, S): bool for sdpa, additive for eager; None where sdpa's own causal rule says the same.

    None is right for two shapes only: queries that are the keys, in order, and one *new* token, the last of all. One
    query out of several new tokens must not see what comes after it. `themselves`: every query sees its own key, valid
    or not.
    """
    plain = keys is queries or state.real.shape[1] == 1
    unbounded = site.window is None or site.window >= state.span
    whole = keys.all_valid and queries.all_valid
    if plain and whole and unbounded and not themselves and site.implementation == "sdpa":
        return None
    visible = visible_keys(queries.slots, keys, site.window)
    if themselves:
        visible = visible | torch.eye(visible.shape[-1], dtype=torch.bool, device=visible.device)
    elif not whole:  # a filler's row must see something; its output is discarded
        visible = visible | ~visible.any(-1, keepdim=True)
    visible = visible[:, None]
    if site.implementation == "sdpa":
        return visible
    lowest = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, lowest)
