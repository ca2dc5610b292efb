"""The flag --kv: `auto`, one mode for all blocks, or a list with one mode per block."""

from __future__ import annotations

from typing import Any

from ftp_lightning.cli.option import option
from ftp_lightning.errors import UserError
from ftp_lightning.schedule import KV

AUTO = "auto"
"""The mode of the pruner or schedule that is given, else the stage's default."""


def kv_option(default: str, help: str, *words: str) -> Any:
    """A field for --kv: a mode, a list of modes, or one of `words`."""
    return option(default, f"{help}; evict, keep, or a list with one mode per block", raw=True, read=_Reader(words))


class _Reader:
    """Turns `evict,keep`, `[evict, keep]` or a YAML list into "evict,keep". UserError for a word that is no mode."""

    def __init__(self, words: tuple[str, ...]):
        self.words = words

    def __call__(self, given: Any) -> str:
        text = ",".join(map(str, given)) if isinstance(given, list | tuple) else str(given)
        listed = [part.strip(" '\"") for part in text.strip("[]() ").split(",")]
        if len(listed) == 1 and listed[0] in self.words:
            return listed[0]
        for part in listed:
            if part not in KV:
                known = ", ".join((*self.words, *KV))
                raise UserError(f"kv is {part!r}, must be one of {known}\nGive --kv one of them, or a mode per block.")
        return ",".join(listed)


def modes_of(kv: str) -> str | tuple[str, ...]:
    """What the flag says, for `Schedule` and `TokenPruner`: "evict", or ("evict", "keep", ...)."""
    listed = tuple(kv.split(","))
    return listed if len(listed) > 1 else listed[0]


def given_modes(kv: str) -> str | tuple[str, ...] | None:
    """`modes_of`; None under `auto`."""
    return None if kv == AUTO else modes_of(kv)


def check_kv_blocks(kv: str, blocks: int) -> None:
    """UserError where the flag lists another number of blocks than the model has."""
    modes = modes_of(kv)
    if not isinstance(modes, str) and len(modes) != blocks:
        raise UserError(f"kv lists {len(modes)} blocks, the model has {blocks}\nGive one mode, or one per block.")
