"""Weights as they are stored: a quantised tensor is made of several plain ones."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def stored_parts(tensor: Tensor, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, plain tensor): the tensor itself, or what a tensor subclass (torchao) is made of.

    A sharded tensor (DTensor) is taken as the whole that it stands for.
    """
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or hasattr(tensor, "device_mesh"):
        yield name, tensor
        return
    for part in flatten()[0]:
        inner = getattr(tensor, part)
        if isinstance(inner, Tensor):
            yield from stored_parts(inner, f"{name}.{part}")


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes."""
    return sum(part.numel() * part.element_size() for _, part in stored_parts(tensor))
