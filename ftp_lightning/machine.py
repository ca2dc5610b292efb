"""What is installed here, which models are at hand, and what this machine can do; each with its remedy."""

from __future__ import annotations

import os
import platform
import shutil
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from ftp_lightning.fingerprint import version_of

REQUIRED = ("torch", "transformers", "lightning", "accelerate", "safetensors", "huggingface_hub", "datasets", "lm_eval")
"""Packages that are shown with their versions; the others of pyproject.toml are shown where something is wrong."""
OPTIONAL = {
    "gguf": "GGUF files, which the named models are",
    "peft": "adapters on a pruned model",
    "tensorboard": "for --tracking tensorboard",
    "torchao": "quantised models",
}
WANTED_MEMORY, WANTED_DISK = 4.0, 2.0
"""Gigabytes below which the doctor warns [ours]: SmolLM2 in float32 with its training fits 4."""


@dataclass(frozen=True)
class Report:
    """What the doctor found.

    Attributes:
        machine: Python, platform, cores, memory and disk in GB, GPUs, GFLOP/s of a float32 matrix product.
        packages: name -> version, None where it is missing.
        models: name -> which weights it stands for, None where it is missing.
        tracking: whether wandb can log, and where.
        problems: what is wrong, and what to do, one dict each.
    """

    machine: dict[str, Any]
    packages: dict[str, str | None]
    models: dict[str, str | None]
    tracking: dict[str, Any]
    problems: list[dict[str, str]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> Report:
    """Look at this machine. Takes some seconds: torch is imported, and one matrix product is timed."""
    machine, packages, models, tracking = _machine(), _packages(), _models(), _tracking()
    problems = [*_wrong_packages(), *_missing_models(models, packages), *_small(machine)]
    return Report(machine, packages, models, tracking, problems)


def _machine() -> dict[str, Any]:
    import psutil
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(number) for number in range(count)]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory.total / 1e9, 1),
        "memory_free_gb": round(memory.available / 1e9, 1),
        "disk_free_gb": round(shutil.disk_usage(".").free / 1e9, 1),
        "gpus": [{"name": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 1)} for gpu in gpus],
        "gflops": _gflops(),
    }


def _gflops(size: int = 768, times: int = 4) -> float:
    """GFLOP/s of a float32 matrix product on the CPU: 2 size^3 FLOPs, the fastest of `times`."""
    import torch

    left, best = torch.ones(size, size), float("inf")
    for _ in range(times):
        start = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - start)
    return round(2e-9 * size**3 / best, 1)


def _packages() -> dict[str, str | None]:
    return {name: version_of(name) for name in ("ftp-lightning", *REQUIRED, *OPTIONAL)}


def _wrong_packages() -> list[dict[str, str]]:
    """Requirements of pyproject.toml that are missing, or have a version outside its range."""
    from packaging.requirements import Requirement

    found = []
    try:
        wanted = [Requirement(text) for text in metadata.requires("ftp-lightning") or []]
    except metadata.PackageNotFoundError:
        wanted = [Requirement(name) for name in REQUIRED]
    for one in wanted:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        version = version_of(one.name)
        if version is None:
            found.append(_problem(f"{one.name} is not installed", f"pip install '{one.name}{one.specifier}'"))
        elif not one.specifier.contains(version, prereleases=True):
            what = f"{one.name} {version} is installed, {one.specifier} is needed"
            found.append(_problem(what, f"pip install '{one.name}{one.specifier}'"))
    return found


def _models() -> dict[str, str | None]:
    from ftp_lightning.errors import UserError
    from ftp_lightning.models import title
    from ftp_lightning.models.named import NAMED

    found: dict[str, str | None] = {"embedded": "our own Llama of 10 M parameters"}
    for name in NAMED:
        try:
            found[name] = title(name)
        except UserError:
            found[name] = None
    return found


def _missing_models(models: dict[str, str | None], packages: dict[str, str | None]) -> list[dict[str, str]]:
    missing = [name for name, title in models.items() if title is None]
    found = [_problem(f"the model {name} is not installed", "make models (or docs/models.md)") for name in missing]
    if packages["gguf"] is None and len(missing) < len(models) - 1:
        found.append(_problem("gguf is not installed, so that GGUF files cannot be read", "pip install gguf"))
    return found


def _tracking() -> dict[str, Any]:
    mode = os.environ.get("WANDB_MODE", "online")
    return {"wandb": version_of("wandb"), "mode": mode, "tensorboard": version_of("tensorboard")}


def _small(machine: dict[str, Any]) -> list[dict[str, str]]:
    found = []
    if machine["memory_gb"] < WANTED_MEMORY:
        what = f"{machine['memory_gb']} GB of memory are little"
        found.append(_problem(what, "use --model embedded, or smaller --batch_size"))
    if machine["disk_free_gb"] < WANTED_DISK:
        found.append(_problem(f"{machine['disk_free_gb']} GB of disk are free", "free some space"))
    return found


def _problem(what: str, remedy: str) -> dict[str, str]:
    return {"what": what, "remedy": remedy}
