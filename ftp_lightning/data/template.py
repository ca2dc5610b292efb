"""A chat rendered by the tokenizer's own template: in transformers' sandbox, for a limited time, to a limited length.

A template is a program that whoever published the tokenizer has written.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from typing import Any

from ftp_lightning.errors import UserError

SECONDS, LONGEST = 5.0, 50_000_000
"""Time for one chat, and characters of it [ours]: a template takes a millisecond."""
DAY = datetime(2024, 7, 26)
"""What a template that asks for today's date is told [Llama 3's, where there is no clock]: answers must not differ from
day to day."""
REMEDY = "Give a tokenizer with another chat template, or leave the template out."


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], today: bool = False, **about: Any) -> str:
    """The chat as text, written today or on `DAY`.

    UserError where the template fails, does not end, or makes no text that can be encoded.
    """
    with limited(today=today):
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, **about)
    return checked(text)


def checked(text: Any) -> str:
    """What a template has made, if it is a text that can be encoded and is not too long; else UserError."""
    try:
        if isinstance(text, str) and len(text) <= LONGEST and text.encode() is not None:
            return text
    except UnicodeEncodeError:
        pass
    raise UserError(f"the tokenizer's chat template makes no text that can be used\n{REMEDY}")


class _Clock(threading.local):
    """Whether templates of this thread are told `DAY` when they ask for the date."""

    stands = False


_clock = _Clock()


@cache
def _guard_sandbox() -> None:
    """Have jinja's sandbox, in which transformers runs templates, ask us before it makes a giant in one operation,
    which no time limit interrupts, and when it looks at the clock."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox

    plain, plain_call = Sandbox.call_binop, Sandbox.call

    def guarded(self: Any, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _is_giant(operator, left, right):
            raise OverflowError(f"{operator} would make more than {LONGEST} characters")
        return plain(self, context, operator, left, right)

    def called(self: Any, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        if _clock.stands and getattr(function, "__name__", "") == "strftime_now":
            return DAY.strftime(*args, **kwargs)
        return plain_call(self, context, function, *args, **kwargs)

    Sandbox.intercepted_binops = Sandbox.intercepted_binops | {"*", "**", "%"}
    Sandbox.call_binop, Sandbox.call = guarded, called


def _is_giant(operator: str, left: Any, right: Any) -> bool:
    if operator == "%":
        return isinstance(left, str) and re.search(r"%[^a-zA-Z%]*(\d{5,}|\*)", left) is not None
    if operator == "**":
        return not isinstance(right, int | float) or abs(right) > 64
    sizes = [len(side) if hasattr(side, "__len__") else side for side in (left, right)]
    return hasattr(left, "__len__") != hasattr(right, "__len__") and sizes[0] * sizes[1] > LONGEST


@contextmanager
def limited(seconds: float = SECONDS, today: bool = False) -> Iterator[None]:
    """Inside, a chat template that runs longer, and whatever one raises, is a UserError. It is told `DAY`, or `today`,
    when it asks for the date. For this thread alone."""
    _guard_sandbox()
    stood, _clock.stands = _clock.stands, not today
    end = time.monotonic() + seconds
    before = sys.gettrace()

    def watch(frame: Any, event: str, argument: Any) -> Any:
        """Python calls it for every line of a template, whose code has this name; other code runs unwatched."""
        if frame.f_code.co_filename != "<template>":
            return None
        if time.monotonic() > end:
            raise TimeoutError(f"it takes longer than {seconds:g} seconds")
        return watch

    sys.settrace(watch)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # jinja's own kinds, and whatever a template can make Python raise
        said = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"the tokenizer's chat template fails: {said}\n{REMEDY}") from error
    finally:
        sys.settrace(before)
        _clock.stands = stood
