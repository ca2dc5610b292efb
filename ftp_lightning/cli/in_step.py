"""One stage, by all processes that a launcher has started."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

from ftp_lightning.cli.settings import Settings
from ftp_lightning.errors import UserError
from ftp_lightning.models import resolve_device
from ftp_lightning.processes import Together, together

GRACE = 5.0
"""Seconds that a helper's refusal waits: as a rule the first process says the same, and the launcher ends all."""


def execute_in_step(settings: Settings) -> None:
    """The first process executes the stage; the others help where it has work for all, and write and say nothing.

    `--processes` is what was started, unless another number is asked for, which is refused.
    """
    team = together(resolve_device(getattr(settings, "device", "cpu")))
    if team.processes.rank > 0:
        return _help(team)
    if getattr(settings, "processes", None) == 1:
        settings = replace(settings, **{"processes": team.processes.count})
    try:
        settings.execute()
    except BaseException:
        if not team.busy:  # else they are in the middle of it, and end with this process
            team.dismiss()
        raise
    team.dismiss()


def _help(team: Together) -> None:
    try:
        team.help()
    except UserError:
        time.sleep(GRACE)
        raise
    except RuntimeError as error:
        if team.busy:
            raise
        print(f"the first process is gone: {str(error).splitlines()[0][:120]}", file=sys.stderr)
        sys.exit(1)
