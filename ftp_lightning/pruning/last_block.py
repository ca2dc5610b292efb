"""The last block of a prompt of which little is read (`logits_to_keep`): the other tokens leave their keys and values.

Shapes: B rows, T new tokens, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.pruning.kept import Kept, tensor_of

if TYPE_CHECKING:
    from ftp_lightning.pruning.attached import Attached
    from ftp_lightning.pruning.block_run import BlockRun


def run_last(run: BlockRun, kept: Kept | None) -> Tensor | None:
    """(B, T, D): the block's output at the tokens that are read, anything at the others, the cache as ever; None where
    all may be read. kept: the tokens that enter; None: all."""
    read, attached, hidden = _read(run, kept), run.attached, run.call.hidden
    if read is None:
        return None
    run.forward.trace.last_only = True
    output = run.run_kept(run.inner, run.call, read if kept is None else kept, read, dense=kept is None)
    if kept is not None and attached.maps is not None:  # some of those that are read skip
        split = hidden.shape[1] - (run.forward.last_tokens or 0)
        tail = run.skipped(hidden[:, split:], "block")
        hidden = torch.cat([hidden[:, :split].to(tail.dtype), tail], 1)
    return hidden if output is None else read.put(hidden, tensor_of(output))


def _read(run: BlockRun, kept: Kept | None) -> Kept | None:
    """Of the tokens that enter those whose output is read; None where all may be."""
    forward, attached, last = run.forward, run.attached, run.forward.last_tokens
    tokens = forward.real.shape[1]
    if last is None or last >= tokens or forward.routed is None or forward.training is not None:
        return None
    if attached.plan.enters_parts or _is_watched(attached):
        return None
    keep = (forward.real if kept is None else kept.keep).clone()
    keep[:, : tokens - last] = False
    if kept is None and not forward.padded:
        return Kept(keep, [last] * len(keep))
    if keep.device.type == "cpu":  # elsewhere this would wait for the device
        return Kept(keep, keep.sum(1).tolist())
    return None


def _is_watched(attached: Attached) -> bool:
    """Whether a hook may look at what the last block or the decoder returns."""
    watched = (attached.blocks[-1], attached.decoder, *attached.decoder.children())
    return any(module._forward_hooks or module._forward_pre_hooks for module in watched)
