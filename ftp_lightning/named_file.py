"""The one door for files that a user names: is it a path, a regular file, not too large, UTF-8, harmless YAML."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from ftp_lightning.errors import UserError

LARGEST_TEXT, LARGEST_YAML = 2 * 2**30, 256 * 1024
"""Bytes of a text and of a file of settings [ours]: texts are read whole, settings take a few kB."""


def named_path(text: str | os.PathLike, what: str = "the path") -> Path:
    """The path that a user has written, with ~ resolved. UserError where it cannot be one."""
    written = os.fspath(text)
    if not written.strip():
        raise UserError(f"{what} is empty: is a variable not set?\nGive a value, or leave it out.")
    if "\0" in written or not _encodes(written):
        raise UserError(
            f"{what} is {written[:80]!r}, which cannot be the name of a file\nRemove the unprintable characters."
        )
    try:
        return Path(written).expanduser()
    except RuntimeError:
        raise UserError(f"{what} is {written[:80]!r}, and there is no such user\nWrite the full path.") from None


def _encodes(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def read_named(path: str | os.PathLike, most: int = LARGEST_TEXT) -> bytes:
    """The content of a regular file of at most `most` bytes. UserError, which names it, where that cannot be had."""
    path = named_path(path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path} is not a file\nGive the path of a file.")
        if found.st_size > most:
            raise UserError(f"{path} has {found.st_size:,} bytes, at most {most:,} are read\nGive a smaller file.")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}\nGive the path of a readable file.") from None


def read_named_text(path: str | os.PathLike, most: int = LARGEST_TEXT) -> str:
    """The UTF-8 text in a file that a user has named. UserError as `read_named`, and for another encoding."""
    content = read_named(path, most)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})\nConvert it first, e.g. with iconv.") from None


def read_yaml(path: str | os.PathLike) -> Any:
    """The value of a small YAML file. UserError as `read_named_text`, for broken YAML, and for YAML that explodes."""
    return parse_yaml(read_named_text(path, LARGEST_YAML), str(path))


def parse_yaml(text: str, path: str) -> Any:
    """The value that YAML text from `path` says. UserError where it is broken, or explodes."""
    import yaml

    from ftp_lightning.yaml_file import load_yaml

    try:
        return load_yaml(text, path)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}\nCorrect it.") from None
