"""Stage `report`: one page that shows what a run, a study, or several runs side by side have found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ftp_lightning.cli.option import option
from ftp_lightning.cli.progress import Progress
from ftp_lightning.cli.settings import Settings
from ftp_lightning.errors import UserError

COMPARISON = "runs/comparison"


@dataclass(frozen=True, kw_only=True)
class ReportStage(Settings):
    """Write report.html, self-contained, into the folder of a run or study; of several runs, side by side, into OUTPUT.
    It is written anew every time."""

    stage: ClassVar[str] = "report"

    runs: tuple[str, ...] = option((), "folder of a run or study, or of several runs", passive=True, positional=True)
    run: str | None = option(None, "folder that `run` has written, or a study", passive=True)
    output: str | None = option(
        None, f"of one run the same, under the name that every stage knows; of several {COMPARISON}", passive=True
    )
    overwrite: bool = option(False, "as for every stage; the page is written anew in any case", passive=True)

    def check(self) -> None:
        if len(self.runs) > 1:
            if self.run is not None:
                raise UserError("--run cannot be combined with several folders\nName all folders without a flag.")
        elif len([given for given in (*self.runs, self.run, self.output) if given is not None]) != 1:
            raise UserError(
                "report needs the folder of a run, or of several\nGive one, as --run runs/demo, or several."
            )

    def execute(self, progress: Progress | None = None) -> Path:
        from ftp_lightning.report import build_comparison, build_report

        if len(self.runs) > 1:
            folder = Path(self.output or COMPARISON).expanduser()
            page = build_comparison([Path(run).expanduser() for run in self.runs], folder)
        else:
            folder = Path(next(iter(self.runs), self.run or str(self.output))).expanduser()
            page = build_report(folder)
        (progress or Progress(self.stage)).say(f"wrote {page}")
        return folder
