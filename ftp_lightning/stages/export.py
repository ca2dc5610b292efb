"""Stage `export`: a model and its pruner as one folder for stock transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ftp_lightning.cli.option import option
from ftp_lightning.cli.progress import Progress
from ftp_lightning.cli.settings import Settings
from ftp_lightning.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ExportStage(Settings):
    """Write a model and its pruner as one folder: `transformers serve FOLDER --trust-remote-code` then prunes, and so
    does `from_pretrained(FOLDER, trust_remote_code=True).generate`.
    """

    stage: ClassVar[str] = "export"

    pruned: str | None = option(None, "folder of a pruner, or the name of a ready-made one (docs/models.md)")
    output: str | None = option(None, "folder to write")
    model: str | None = option(None, "its base model; by default the one that it names")
    link: bool = option(False, "link to the base's weights on this disk in place of copying them")
    overwrite: bool = option(False, "replace an earlier export", passive=True)

    def check(self) -> None:
        if not (self.pruned and self.output):
            raise UserError("export needs a pruner and an output folder\nGive --pruned FOLDER and --output FOLDER.")

    def execute(self, progress: Progress | None = None) -> Path:
        from ftp_lightning.serving.export import export

        progress = progress or Progress(self.stage)
        folder = export(str(self.pruned), str(self.output), self.model, self.link, self.overwrite)
        progress.say(f"exported; serve it by: transformers serve {folder} --trust-remote-code")
        return folder
