"""What a pruner remembers of its base model's weights, so that it knows them again in another dtype.

Rounding float32 to float16 and then to bfloat16 is not rounding it to bfloat16. What is kept is therefore a checksum of
all weights in every dtype that they can be rounded to without rounding twice, and a sketch that is compared with a
tolerance where a bfloat16 model meets a float16 one.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SKETCH = 2048
"""Numbers in a sketch, about [ours]: 11 kB of text."""
_PIECE = 1 << 20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TOLERANCE = 5 * 2.0**-8
"""Five times the largest relative error of rounding to bfloat16 [ours]: by Hoeffding's inequality rounding errors with
random signs add up to more in one of 100,000 sums at most, wherever they come from."""


def weights_record(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """JSON-able: {"float32": checksum, "bfloat16": ..., "float16": ..., "sketch": ...}; a dtype is left out where some
    weight has been rounded to another one already."""
    checks = {dtype: checksum(weights, dtype) for dtype in _exact(weights)}
    numbers = sketch(weights)[0].to("cpu", torch.float32).numpy()
    return checks | {"sketch": base64.b64encode(numbers.tobytes()).decode()}


def same_weights(record: Mapping[str, Any], weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of the record, up to a rounding of either to float32, bfloat16 or float16."""
    shared = [dtype for dtype in _exact(weights) if dtype in record]
    if shared:
        return any(checksum(weights, dtype) == record[dtype] for dtype in shared)
    found, squares = (sums.to("cpu", torch.float32) for sums in sketch(weights))
    stored = torch.frombuffer(bytearray(base64.b64decode(record["sketch"])), dtype=torch.float32)
    if stored.shape != found.shape:
        return False
    smallest = 2.0**-24  # of float16: what is below it is rounded to nothing
    return bool(((found - stored).abs() <= _TOLERANCE * squares.sqrt() + smallest * _PIECE**0.5).all())


def _exact(weights: Mapping[str, Tensor]) -> list[str]:
    """Dtypes in which these weights are what their base is when it is rounded once."""
    kinds = {weight.dtype for weight in weights.values() if weight.is_floating_point() and weight.dtype.itemsize > 1}
    rounded = {name for name, dtype in DTYPES.items() if dtype in kinds and dtype != torch.float32}
    return [name for name in DTYPES if not rounded - {name}]


def checksum(weights: Mapping[str, Tensor], dtype: str) -> str:
    """16 hex digits over names, shapes and all numbers, rounded to `dtype`; the same on every device.

    Of each weight the bits of its numbers are multiplied with pseudo-random odd ones and added up modulo 2^64, piece by
    piece, where the weight is.
    """
    hashed, sums = hashlib.sha256(), []
    for name, weight in sorted(weights.items()):
        hashed.update(repr((name, tuple(weight.shape))).encode())
        factors = _odd(weight.device)
        for piece in weight.detach().reshape(-1).split(_PIECE):
            bits = _rounded(piece, dtype).contiguous()
            bits = bits.view(_BITS[bits.element_size()]).to(torch.int64)
            sums.append((bits * factors[: len(bits)]).sum())
    if sums:
        hashed.update(torch.stack([one.cpu() for one in sums]).numpy().tobytes())
    return hashed.hexdigest()[:16]


def _rounded(piece: Tensor, dtype: str) -> Tensor:
    if not piece.is_floating_point() or piece.dtype.itemsize == 1:
        return piece.to(torch.uint8) if piece.dtype == torch.bool else piece
    return piece.to(torch.float32).to(DTYPES[dtype])


def sketch(weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """About SKETCH sums of neighbouring numbers with pseudo-random signs, and the sums of their squares."""
    total, sums, squares = sum(weight.numel() for weight in weights.values()), [], []
    for _, weight in sorted(weights.items()):
        numbers = weight.detach().reshape(-1)
        width = -(-numbers.numel() // max(1, round(SKETCH * numbers.numel() / total)))
        signs = 1.0 - 2.0 * (_noise(width, numbers.device) & 1).to(torch.float32)
        for piece in numbers.split(width * max(1, _PIECE // width)):
            short = -len(piece) % width
            values = torch.nn.functional.pad(piece.to(torch.float32), (0, short)).view(-1, width)
            sums.append((values * signs).sum(1).cpu())
            squares.append(values.square().sum(1).cpu())
    return torch.cat(sums), torch.cat(squares)


@cache
def _odd(device: torch.device) -> Tensor:
    """(_PIECE,) pseudo-random odd numbers, made once: making them takes longer than using them."""
    return _noise(_PIECE, device) | 1


def _noise(count: int, device: torch.device) -> Tensor:
    """(count,) int64: splitmix64 of 0, 1, 2, ..., the same on every device."""
    x = (torch.arange(count, device=device) + 1) * -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
