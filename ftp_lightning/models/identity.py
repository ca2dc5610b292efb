"""What tells one model from another: its shape, and a sample of its weights."""

import hashlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


def model_identity(model: "PreTrainedModel") -> dict[str, Any]:
    """What a pruner must find again in its base model: its shape, and `weights_sha256` of a sample.

    The sample is every tensor's name, shape, first and last value, rounded to bfloat16: cheap, and the same for one
    checkpoint loaded in float32 or bfloat16 on any device. It tells fine-tuned models apart; it is no protection
    against forgery. A quantised model is another one than its base, and so is one with adapters, whichever is active.
    """
    if (known := model.__dict__.get(_KNOWN)) is not None:
        return dict(known)
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return {
        "model_type": config.model_type,
        "num_blocks": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "vocab_size": config.vocab_size,
        "weights_sha256": _weights_sample(model),
    }


def remember_identity(model: "PreTrainedModel") -> None:
    """Ask now who the model is, once for all: of a model whose weights are to be cut up."""
    model.__dict__[_KNOWN] = model_identity(model)


_KNOWN = "_ftp_identity"


def _weights_sample(model: "PreTrainedModel") -> str:
    tensors = {name: tensor for name, tensor in sorted(_named_weights(model)) if tensor.numel()}
    ends = [t.detach().flatten()[at].to(torch.bfloat16) for t in tensors.values() for at in (0, -1)]
    if len({end.device for end in ends}) > 1:
        ends = [end.cpu() for end in ends]
    ends = torch.stack(ends)
    head = repr([(name, tuple(tensor.shape)) for name, tensor in tensors.items()])
    values = ends.to("cpu", torch.float32).numpy()
    return hashlib.sha256(head.encode() + values.tobytes()).hexdigest()


def _named_weights(model: "PreTrainedModel") -> "Iterator[tuple[str, torch.Tensor]]":
    """Names and weights, as they are stored; what peft wraps a model in adds no prefix to the names."""
    from ftp_lightning.costs.stored import stored_parts
    from ftp_lightning.pruning.devices import fetched

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = {id(weight): name for name, weight in base.named_parameters()}
    for name, weight in model.named_parameters():
        yield from stored_parts(fetched(model, name, weight), own.get(id(weight), name))
