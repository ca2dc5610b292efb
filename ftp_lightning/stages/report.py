"""Stage `report`: one page that shows what a run found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ftp_lightning.errors import UserError
from ftp_lightning.stages.base import Settings
from ftp_lightning.stages.option import option
from ftp_lightning.stages.progress import Progress


@dataclass(frozen=True, kw_only=True)
class ReportStage(Settings):
    """Write report.html, self-contained, into the folder of a run. It is written anew every time."""

    stage: ClassVar[str] = "report"

    run: str | None = option(None, "folder that `run` has written", passive=True)
    output: str | None = option(None, "the same, under the name that every stage knows", passive=True)
    overwrite: bool = option(False, "as for every stage; the page is written anew in any case", passive=True)

    def check(self) -> None:
        if (self.run is None) == (self.output is None):
            raise UserError("report needs the folder of one run\nGive --run FOLDER.")

    def execute(self, progress: Progress | None = None) -> Path:
        from ftp_lightning.report import build_report

        folder = Path(self.run or self.output).expanduser()
        page = build_report(folder)
        (progress or Progress(self.stage)).say(f"wrote {page}")
        return folder
