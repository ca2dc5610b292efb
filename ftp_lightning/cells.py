"""Words that somebody else has chosen, put into a CSV, a Markdown table or YAML so that they stay words."""

from __future__ import annotations

import json
import re
from typing import Any

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last four: full width


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: text that begins like one gets an apostrophe before it."""
    if isinstance(value, str) and value.startswith(_FORMULA) and not _is_number(value):
        return f"'{value}"
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def markdown_text(text: str) -> str:
    """The words with all that Markdown and HTML read as their own escaped, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def markdown_code(text: str) -> str:
    """The words as code on one line; backticks in them become apostrophes."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def yaml_text(text: str) -> str:
    """The words as one scalar of YAML, whatever they are: JSON's quoted text is such."""
    return json.dumps(text)
