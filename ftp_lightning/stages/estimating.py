"""`--estimate`: what a stage will take, told in place of running it."""

from __future__ import annotations

import re
from typing import Any

from ftp_lightning.errors import UserError
from ftp_lightning.estimate import NEEDS, UTILISATION, Need, Shape, empty_model, rate
from ftp_lightning.stages.progress import clock

SHARED = ("search", "train")
"""Stages whose work several devices share; the others use one."""


def devices(text: str) -> tuple[int, int]:
    """(devices, GB of each) of `8x80`; UserError for something else."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,3})", text.strip())
    if found is None:
        raise UserError(f"estimate is {text!r}, must be DEVICESxGB\nGive for example --estimate 1x80.")
    count, gigabytes = (int(number) for number in found.groups())
    rate(gigabytes)
    return count, gigabytes


def told(settings: Any) -> str:
    """One line on memory, whether it fits, and time."""
    if settings.stage not in NEEDS:
        raise UserError(f"{settings.stage} has no estimate\nAsk for that of {', '.join(NEEDS)}.")
    count, gigabytes = devices(settings.estimate)
    return line(settings, need_of(settings), count, gigabytes)


def need_of(settings: Any) -> Need:
    from ftp_lightning import models

    config = models.load_config(settings.model, revision=settings.revision)
    shape = Shape.of(empty_model(config, models.DTYPES[settings.dtype]))
    return NEEDS[settings.stage](shape, settings)


def line(settings: Any, need: Need, count: int, gigabytes: int) -> str:
    memory = f"{need.weights / 1e9:.1f} GB weights + {need.working / 1e9:.1f} GB at work"
    used = count if settings.stage in SHARED else 1
    if not need.fits(gigabytes):
        return f"{settings.stage}: {memory}: does not fit {gigabytes} GB; every device holds the whole model"
    time = f"{need.flops:.2g} FLOP, about {clock(need.seconds(used, gigabytes))} on {used} x {rate(gigabytes)[0]}"
    return f"{settings.stage}: {memory}: fits {gigabytes} GB; {time} at {UTILISATION:.0%} of its peak"
