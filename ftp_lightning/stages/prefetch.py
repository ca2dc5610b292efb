"""Stage `prefetch`: models and data sets into the local cache, for machines without network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ftp_lightning.cli.option import option
from ftp_lightning.cli.progress import Progress
from ftp_lightning.cli.settings import Settings
from ftp_lightning.errors import UserError, hub_errors

NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True, kw_only=True)
class PrefetchStage(Settings):
    """Download a model, data sets and tasks into the Hub's cache (HF_HOME); HF_HUB_OFFLINE=1 then needs no network."""

    stage: ClassVar[str] = "prefetch"

    model: str | None = option(None, "Hub name of a model, or a named model")
    revision: str | None = option(None, "revision of the model: branch, tag or commit")
    data: tuple[str, ...] = option((), "Hub data sets, NAME or NAME:CONFIG")
    overwrite: bool = option(False, "download again what is there already", passive=True)
    tasks: tuple[str, ...] = option((), "tasks of lm-eval, whose data sets are fetched")

    def check(self) -> None:
        if not (self.model or self.data or self.tasks):
            raise UserError("prefetch needs to know what to download\nGive --model NAME, --data A,B or --tasks A,B.")

    def execute(self, progress: Progress | None = None) -> Path:
        from huggingface_hub.constants import HF_HUB_CACHE

        progress = progress or Progress(self.stage)
        if self.model:
            place = _attempt(self.model, lambda: _model(self.model, self.revision, self.overwrite))
            progress.say(f"model {self.model} is at {place}")
        for name in self.data:
            _attempt(name, lambda name=name: _dataset(name, self.overwrite))
            progress.say(f"data set {name} is there")
        if self.tasks:
            _attempt(", ".join(self.tasks), lambda: _tasks(list(self.tasks)))
            progress.say(f"tasks {', '.join(self.tasks)} are there")
        return Path(HF_HUB_CACHE)


def _model(name: str, revision: str | None, again: bool) -> str:
    """Weights as safetensors, configuration and tokenizer; pickles are not fetched."""
    from huggingface_hub import snapshot_download

    from ftp_lightning.models import hub_name

    return snapshot_download(hub_name(name), revision=revision, allow_patterns=NEEDED, force_download=again)


def _dataset(name: str, again: bool) -> None:
    from datasets import load_dataset

    path, _, config = name.partition(":")
    load_dataset(path, config or None, download_mode="force_redownload" if again else None)


def _tasks(names: list[str]) -> None:
    from ftp_lightning.evaluation.harness.index import task_manager
    from ftp_lightning.stages.task_files import check_tasks

    check_tasks(names)
    task_manager(names).load(names)


def _attempt(name: str, fetch):
    """`fetch()`, with what the Hub and the network answer told in a sentence."""
    try:
        return fetch()
    except UserError:
        raise
    except hub_errors(OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        remedy = "Check the name, the network and HF_HUB_OFFLINE."
        raise UserError(f"{name} cannot be downloaded from the Hub: {reason}\n{remedy}") from error
