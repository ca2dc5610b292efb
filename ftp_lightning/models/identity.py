"""What tells one model from another: its shape, and a sample of its weights."""

import hashlib
import warnings
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from ftp_lightning.models.weights import same_weights, weights_record

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel


def model_identity(model: "PreTrainedModel") -> dict[str, Any]:
    """What tells answers of one model from those of another: its shape, and `weights_sha256` of a sample.

    The sample is every tensor's name, shape, first and last value, rounded to bfloat16: cheap, and the same for one
    checkpoint loaded in float32 or bfloat16 on any device. It tells fine-tuned models apart; it is no protection
    against forgery. A quantised model is another one than its base, and so is one with adapters, whichever is active.
    """
    from ftp_lightning.pruning.calls import uncompiled

    model = uncompiled(model)
    if (known := model.__dict__.get(_KNOWN)) is not None:
        return {name: value for name, value in known.items() if name != "weights"}
    return _shape(model) | {_SAMPLE: _weights_sample(model)}


def _shape(model: "PreTrainedModel") -> dict[str, Any]:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return {
        "model_type": config.model_type,
        "num_blocks": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "vocab_size": config.vocab_size,
    }


def remember_identity(model: "PreTrainedModel") -> None:
    """Ask now who the model is, once for all: of a model whose weights are to be cut up."""
    model.__dict__[_KNOWN] = model_identity(model) | {"weights": base_record(model)["weights"]}


def base_record(model: "PreTrainedModel") -> dict[str, Any]:
    """What a pruner must find again in its base model: its shape, and all its weights (`models.weights`)."""
    from ftp_lightning.pruning.calls import uncompiled

    model = uncompiled(model)
    known = model.__dict__.get(_KNOWN)
    shape = {name: value for name, value in (known or _shape(model)).items() if name not in (_SAMPLE, "weights")}
    return shape | {"weights": known["weights"] if known else weights_record(_weights(model))}


def differences(record: "Mapping[str, Any]", model: "PreTrainedModel") -> list[str]:
    """In what `model` is another one than the record says, each as "name recorded / found"; empty for the same model.

    Records of older versions hold the sample of `model_identity` in place of all weights. In float16 it cannot be
    compared, and the shape decides.
    """
    from ftp_lightning.pruning.calls import uncompiled

    model = uncompiled(model)
    found = _shape(model) if "weights" in record else model_identity(model)
    names = [name for name in record if name not in ("weights", _SAMPLE) and record[name] != found.get(name)]
    said = [f"{name} {record[name]} / {found.get(name)}" for name in names]
    if said:
        return said
    if "weights" in record:
        return [] if _has_weights(record["weights"], model) else ["other weights"]
    sample = record.get(_SAMPLE)
    if sample in (None, found[_SAMPLE]):
        return []
    if any(weight.dtype == torch.float16 for weight in model.parameters()):
        warnings.warn(
            "this pruner was stored by an older version: in float16 it cannot tell whether the weights are those of "
            "its base model. Load it in float32 and save it again.",
            stacklevel=2,
        )
        return []
    return [f"{_SAMPLE} {sample} / {found[_SAMPLE]}"]


def _has_weights(record: dict[str, Any], model: "PreTrainedModel") -> bool:
    """`same_weights`. The answer is remembered for as long as the weights are not written to.

    Of a small model their sums must be the same as well: that tells what torch does not count (`weight.data`).
    """
    if (known := model.__dict__.get(_KNOWN)) is not None:
        return known["weights"] == record
    own = list(model.parameters())
    if any(weight.is_inference() for weight in own):
        return same_weights(record, _weights(model))
    small = sum(weight.numel() for weight in own) <= _SMALL
    sums = [weight.detach().float().sum().item() for weight in _weights(model).values()] if small else None
    asked = (dict(record), [(id(w), w.data_ptr(), w._version, w.dtype) for w in own], sums)
    if _CHECKED.get(model) != asked:
        if not same_weights(record, _weights(model)):
            return False
        _CHECKED[model] = asked
    return True


_KNOWN, _SAMPLE = "_ftp_identity", "weights_sha256"
_SMALL = 1 << 24
"""Weights that are added up each time a pruner is attached [ours]: it takes milliseconds."""
_CHECKED: "WeakKeyDictionary[PreTrainedModel, tuple]" = WeakKeyDictionary()


def _weights_sample(model: "PreTrainedModel") -> str:
    tensors = _weights(model)
    ends = [t.detach().flatten()[at].to(torch.bfloat16) for t in tensors.values() for at in (0, -1)]
    if len({end.device for end in ends}) > 1:
        ends = [end.cpu() for end in ends]
    ends = torch.stack(ends)
    head = repr([(name, tuple(tensor.shape)) for name, tensor in tensors.items()])
    values = ends.to("cpu", torch.float32).numpy()
    return hashlib.sha256(head.encode() + values.tobytes()).hexdigest()


def _weights(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in sorted(_named_weights(model)) if tensor.numel()}


def _named_weights(model: "PreTrainedModel") -> "Iterator[tuple[str, torch.Tensor]]":
    """Names and weights, as they are stored; what peft wraps a model in adds no prefix to the names."""
    from ftp_lightning.costs.stored import stored_parts
    from ftp_lightning.pruning.devices import fetched

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = {id(weight): name for name, weight in base.named_parameters()}
    for name, weight in model.named_parameters():
        yield from stored_parts(fetched(model, name, weight), own.get(id(weight), name))
