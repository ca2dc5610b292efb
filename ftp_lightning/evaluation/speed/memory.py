"""Measured memory: the peak of a prefill, and the bytes that its cache holds."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROCESS = Path("/proc/self")


def why_no_peak(device: torch.device) -> str | None:
    """Why peaks cannot be measured on this device; None where they can."""
    if device.type == "cuda":
        return None
    if device.type != "cpu":
        return f"there is no peak memory on {device.type}"
    try:
        _reset_peak()
        _kilobytes("VmHWM"), _kilobytes("VmRSS")
    except (OSError, ValueError, LookupError) as error:
        return f"this system does not let a process reset its peak memory ({type(error).__name__})"
    return None


@torch.no_grad()
def peak_bytes(run: Callable[[], Any], device: torch.device, repeats: int = 3) -> int:
    """Peak memory of `run` above what was allocated before it, in bytes; the median of `repeats` calls.

    On CUDA what the allocator gave out; on the CPU resident memory (VmHWM against VmRSS, in steps of a page), after
    garbage has been collected and free memory has gone back to the system. Ask `why_no_peak` first.
    """
    return int(torch.tensor([_one_peak(run, device) for _ in range(repeats)]).median())


def _one_peak(run: Callable[[], Any], device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    trim()
    _reset_peak()
    before = _kilobytes("VmRSS")
    run()
    return 1024 * max(_kilobytes("VmHWM") - before, 0)


def trim() -> None:
    """Give free memory of the C library back to the system, where it can (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass


def _reset_peak() -> None:
    """Linux: VmHWM becomes the resident memory of now. OSError where this is not permitted."""
    (PROCESS / "clear_refs").write_text("5")


def _kilobytes(name: str) -> int:
    """One line of /proc/self/status, in kB."""
    lines = dict(line.split(":", 1) for line in (PROCESS / "status").read_text().splitlines())
    return int(lines[name].split()[0])


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a Hugging Face cache holds."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)
