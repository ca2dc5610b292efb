"""Stage `doctor`: what is installed, which models are at hand, what this machine can do, and what to do about it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ftp_lightning.cli.option import option
from ftp_lightning.cli.progress import Progress
from ftp_lightning.cli.settings import Settings

if TYPE_CHECKING:
    from ftp_lightning.machine import Report


@dataclass(frozen=True, kw_only=True)
class DoctorStage(Settings):
    """Say what is installed and in which versions, which models are at hand, and what this machine can do. What is
    missing is named with its remedy. Writes nothing."""

    stage: ClassVar[str] = "doctor"

    json: bool = option(False, "print the report as JSON")

    def execute(self, progress: Progress | None = None) -> Path:
        from ftp_lightning.machine import examine

        report = examine()
        print(json.dumps(report.record(), indent=1) if self.json else told(report))
        return Path()


def told(report: Report) -> str:
    """The report for a person."""
    machine = report.machine
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory_gb']} GB)" for gpu in machine["gpus"]) or "none"
    free, memory, disk = (machine[name] for name in ("memory_free_gb", "memory_gb", "disk_free_gb"))
    lines = [
        "Machine",
        f"  Python {machine['python']} on {machine['platform']}",
        f"  {machine['cores']} cores, {machine['threads']} used by torch, {machine['gflops']} GFLOP/s in float32",
        f"  {free} of {memory} GB memory free, {disk} GB disk free",
        f"  GPUs: {gpus}",
        *("", "Packages"),
        *(f"  {name:16} {version or _missing(name)}" for name, version in report.packages.items()),
        *("", "Models"),
        *(f"  {name:22} {title or 'not installed'}" for name, title in report.models.items()),
        *("", "Tracking", f"  wandb {report.tracking['wandb'] or 'not installed'}, mode {report.tracking['mode']}"),
        *("", "To do" if report.problems else "Nothing is missing."),
        *(f"  {problem['what']}: {problem['remedy']}" for problem in report.problems),
    ]
    return "\n".join(lines)


def _missing(name: str) -> str:
    from ftp_lightning.machine import OPTIONAL

    return f"not installed (optional: {OPTIONAL[name]})" if name in OPTIONAL else "not installed"
