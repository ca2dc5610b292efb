"""A router's dense look at a prompt, before it is routed.

Shapes: B rows, P routed tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.block_run import ScoutDone
from ftp_lightning.pruning.forward import Forward, prompt_table
from ftp_lightning.pruning.generation import split_arguments
from ftp_lightning.pruning.kept import Tokens
from ftp_lightning.pruning.trace import Trace

if TYPE_CHECKING:
    from ftp_lightning.pruning.attached import Attached


@torch.no_grad()
def scouted(attached: Attached, inner, arguments: dict, prompt: Forward) -> Tensor:
    """What the router's `Scout` says of the prompt's tokens: (B, P) float32."""
    scout, routed = attached.plan.needs.scout, prompt.routed
    assert scout is not None and routed is not None  # else nobody asks
    width = routed.real.shape[1]
    if prompt.past:
        raise UserError("this router looks at whole prompts; chunks on a filled cache are not supported.")
    first = split_arguments(arguments, width, 0)[0] if width < prompt.real.shape[1] else arguments
    seen = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    about = {name: first[name] for name in seen if first.get(name) is not None}
    about["use_cache"] = True  # without a cache transformers asks the device whether texts are packed
    if scout.kind == "surprisal":
        return _surprisal(attached, about, routed.position)
    slots = prompt.new.slots[:, :width]
    look = Forward(
        routed.real, 0, width, Tokens(slots, routed.real, not prompt.padded), prompt.home, Trace(),
        padded=prompt.padded, routed=routed, look=scout, scored=frozenset({scout.blocks - 1}),
    )  # fmt: skip
    look.table = table = prompt_table(attached, look)
    try:
        with attached.ambient.having(forward=look):
            inner(**about)
    except ScoutDone:
        pass
    return table.own.to(look.home)


def _surprisal(attached: Attached, about: dict, position: Tensor) -> Tensor:
    """-log p(x_j | x_<j) by the dense model; infinite for a row's first token. (B, P) float32."""
    ids = about.get("input_ids")
    if ids is None or attached.model.get_output_embeddings() is None:
        raise UserError("surprisal needs token ids and a model with an output head.")
    with attached.ambient.having(stock=True, forward=None):
        logits = attached.model(**about).logits.float()
    said = logits[:, :-1].logsumexp(-1) - logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    said = torch.nn.functional.pad(said, (1, 0), value=torch.inf)
    return said.masked_fill(position == 0, torch.inf)
