"""One flag of a stage: its default, its help and its bounds stand in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

from ftp_lightning.errors import UserError
from ftp_lightning.named_file import named_path

SMALLEST, LARGEST = 1e-9, 1e15
"""What a number that is not 0 may be in size where its option says nothing narrower [ours]."""
RESERVED = 2
"""Tokens of a prompt that are always kept where a block is pruned: the first and the last (method.md, section 2)."""


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    above: float | None = None,
    is_file: bool = False,
    passive: bool = False,
    raw: bool = False,
    positional: bool = False,
    read: Callable[[Any], Any] | None = None,
) -> Any:
    """A field that is a flag: `default`, `help`, and what it may be.

    least, most (included), below, above (excluded) bound it; None values are not bounded. `is_file`: a path whose
    *content* is an input. `passive`: has no influence on what the stage finds. `raw`: the words as they are, never read
    as YAML. `positional`: the words that stand without a flag, as many as there are. `read`: makes the value of what
    was given, or raises a UserError.
    """
    bounds = {"least": least, "most": most, "below": below, "above": above}
    said = {"help": help, "bounds": bounds, "is_file": is_file, "passive": passive, "raw": raw}
    said |= {"positional": positional, "read": read}
    return field(default=default, metadata=said)


def check_bounds(name: str, value: Any, bounds: dict[str, float | None]) -> None:
    """UserError where a value is out of the bounds that `option` was given, or no number that means anything."""
    if value is not None and not isinstance(value, tuple) and any(bound is not None for bound in bounds.values()):
        _check_bounds(name, value, bounds)
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int | float) and not isinstance(number, bool):
            _check_size(name, number)


def _check_bounds(name: str, value: Any, bounds: dict[str, float | None]) -> None:
    least, most, below, above = (bounds[key] for key in ("least", "most", "below", "above"))
    fits = (
        (least is None or value >= least)
        and (most is None or value <= most)
        and (below is None or value < below)
        and (above is None or value > above)
    )
    if not fits:
        small = isinstance(value, int) and least is not None and value < least  # then what is too large says nothing
        wanted = _in_words(least, None, None, None) if small else _in_words(least, most, below, above)
        raise UserError(f"{name} is {value}, must be {wanted}\nChange --{name} or the key {name} of the config file.")


def _in_words(least: float | None, most: float | None, below: float | None, above: float | None) -> str:
    """The bounds as text: "at least 1", "above 0", "in [0, 1)"."""
    low = f"({_number(above)}" if above is not None else f"[{_number(least)}" if least is not None else ""
    high = f"{_number(below)})" if below is not None else f"{_number(most)}]" if most is not None else ""
    if low and high:
        return f"in {low}, {high}"
    if low:
        return f"at least {low[1:]}" if above is None else f"above {low[1:]}"
    return f"at most {high[:-1]}" if below is None else f"below {high[:-1]}"


def _number(bound: float | None) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _check_size(name: str, number: float) -> None:
    if number == 0 or SMALLEST <= abs(number) < LARGEST:  # false for nan as well
        return
    raise UserError(
        f"{name} is {number:g}, must be 0, or from {SMALLEST:g} to {LARGEST:g} in size\n"
        f"Change --{name} or the key {name} of the config file."
        if isinstance(number, float)
        else f"{name} is {str(number)[:30]}, must be at most {LARGEST:g}\nChange --{name}."
    )


def check_words(name: str, value: Any) -> None:
    """UserError where a text, or one of a list, is empty or no text that a path or name could be."""
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str):
            named_path(text, name)


def check_reachable(budget: float, prompt_tokens: int) -> None:
    """UserError where prompts of this many tokens, the reserved ones always kept, cannot skip a share of `budget`."""
    reachable = 1 - RESERVED / prompt_tokens
    if budget > reachable:
        raise UserError(
            f"budget {budget} cannot be reached with prompts of {prompt_tokens} tokens: the first and the last are "
            f"always kept, so at most {reachable:.3g} can be skipped\nGive a smaller --budget or longer prompts."
        )
