"""What a dense forward's last tokens attend to: which earlier tokens a text goes on to use. [ours]

Shapes: B rows, T tokens, S = T keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ftp_lightning.pruning.attention import interface, tap_attention
from ftp_lightning.pruning.devices import home
from ftp_lightning.pruning.family import find_attention, find_decoder, sliding_window
from ftp_lightning.pruning.kept import Tokens
from ftp_lightning.pruning.scores import Tapped, received_attention


@contextmanager
def listening(model: nn.Module, last: int, real: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Within, a dense forward of whole texts (no cache) adds to the list, block by block, the attention score (B, T) of
    every token, as the last `last` real tokens of its row see it (`scores.received_attention`); 0 where they do not.

    real (B, T) bool: False for padding. No pruner is attached; the forward is the stock one.
    """
    heard: list[Tensor] = []
    undo, place = [], home(model)
    try:
        for block in find_decoder(model)[1]:
            attention = find_attention(block)
            undo.append(tap_attention(attention, _listener(attention, heard, last, real, place)))
        yield heard
    finally:
        for one in undo:
            one()


def _listener(attention: nn.Module, heard: list[Tensor], last: int, real: Tensor | None, place: torch.device):
    name, window = attention.config._attn_implementation, sliding_window(attention)

    def run(module, query, key, value, mask, kwargs):
        slots = torch.arange(key.shape[2], device=key.device).expand(key.shape[0], -1)
        valid = torch.ones_like(slots, dtype=torch.bool) if real is None else real.to(slots.device)
        tokens = Tokens(slots, valid, real is None)
        with torch.no_grad(), torch.autocast(key.device.type, enabled=False):
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            tapped = Tapped(query.detach(), key.detach(), scaling, kwargs.get("softcap"), window)
            scores, seen = received_attention(tapped, tokens, tokens, last)
            heard.append(scores.masked_fill(~seen, 0.0).to(place))
        return interface(name, module)(module, query, key, value, mask, **kwargs)

    return run


def needed_later(heard: list[Tensor]) -> list[Tensor]:
    """Of each block the greatest score that a token is given in it or in any block after it: a token that is skipped
    now is missing there. [ours]"""
    needed = list(heard)
    for block in reversed(range(len(heard) - 1)):
        needed[block] = torch.maximum(heard[block], needed[block + 1])
    return needed
