"""A frozen model of which every process holds a share: torch's FSDP (`fully_shard`), block by block.

A block's weights are gathered before it runs, forward and backward, and dropped after it; each process holds 1/W.
Embedding, last norm and head stay whole. All processes must call the blocks equally often and in the same order, which
router training does: every one runs the same passes over rows of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ftp_lightning.errors import UserError
from ftp_lightning.pruning.family import find_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftp_lightning.processes import Processes


def shard(model: PreTrainedModel, processes: Processes, device: torch.device) -> PreTrainedModel:
    """`model`, whole on the CPU, in place: its blocks sharded over all processes on `device`, the rest on `device`.

    Block after block goes to the device and is cut there, so that no device ever holds more than its share and one
    block. Who the model is (`models.model_identity`) is asked before: later no process can say it alone. UserError for
    weights that are more than one tensor (quantised ones).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from ftp_lightning.models import remember_identity

    if any(hasattr(weight, "__tensor_flatten__") for weight in model.parameters()):
        raise UserError("quantised weights cannot be sharded\nLeave --shard out.")
    remember_identity(model)
    decoder, blocks = find_decoder(model)
    mesh = init_device_mesh(device.type, (processes.count,))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    within = {id(weight) for weight in blocks.parameters()}
    rest = {weight for weight in decoder.parameters() if id(weight) not in within}
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True, ignored_params=rest)  # so that the blocks have one root
    return model.to(device)


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether a forward of this model needs all processes."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
