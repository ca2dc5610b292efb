"""JSON that somebody else may have written: looked at before it is read, and what is wrong with it told in a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: str | os.PathLike, most: int) -> Any:
    """The value in a file of at most `most` bytes. OSError where it cannot be read, ValueError where it is something
    else than a file, larger, or broken."""
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file() and not path.is_dir():  # a pipe would be waited for; a folder says so itself
        raise ValueError("it is not a file")
    if size > most:
        raise ValueError(f"it has {size} bytes, at most {most} are expected")
    return parse_json(path.read_bytes())


def parse_json(content: bytes | str) -> Any:
    """The value that JSON text says. ValueError where it is broken, or nested so deeply that no parser follows."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def finite_numbers(value: Any, what: str) -> list[float]:
    """`value`, if it is a list of finite numbers; ValueError otherwise: text is none, however it reads."""
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a list of numbers, not {type(value).__name__}")
    for place, number in enumerate(value):
        if type(number) not in (int, float) or not -1e300 < number < 1e300:  # holds for integers of any length
            raise ValueError(f"{what}, number {place + 1}, is {str(number)[:40]!r}, must be a finite number")
    return [float(number) for number in value]
