"""`--estimate`: what a stage will take, told in place of running it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ftp_lightning.cli.progress import clock
from ftp_lightning.errors import UserError
from ftp_lightning.estimate import NEEDS, UTILISATION, Need, Shape, empty_model, rate


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
    return replace(NEEDS[settings.stage](shape, settings), largest=shape.largest)


def line(settings: Any, need: Need, count: int, gigabytes: int) -> str:
    """What is said of a stage: as it is asked for, or with --device_map auto where one device is too small."""
    memory = f"{need.weights / 1e9:.1f} GB weights + {need.working / 1e9:.1f} GB at work"
    fits, working = need.fits(gigabytes), 1 if need.alone == need.flops else count
    spread = None if fits else need.spread(count, gigabytes)
    if not fits and spread is None:
        return f"{settings.stage}: {memory}: does not fit {count} x {gigabytes} GB"
    where = f"fits {gigabytes} GB" if fits else f"fits {spread} x {gigabytes} GB with --device_map auto"
    working = working if fits else 1  # of devices that hold one model between them one is at work at a time
    time = f"{need.flops:.2g} FLOP, about {clock(need.seconds(working, gigabytes))} on {working} x {rate(gigabytes)[0]}"
    return f"{settings.stage}: {memory}: {where}; {time} at {UTILISATION:.0%} of its peak"
