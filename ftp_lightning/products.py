"""What a finished stage has written: named with its hashes in the stage's record, and read through one checked door."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ftp_lightning.errors import UserError, file_error
from ftp_lightning.fingerprint import PROVENANCE, hash_path
from ftp_lightning.json_file import parse_json, read_json
from ftp_lightning.whole_files import inside, set_aside

SIDE = ("checkpoints", "logs", "wandb")
"""Parts of a folder that nothing reads once its stage is finished; other programs may change them."""
_LARGEST_RECORD, _LARGEST_PRODUCT = 64_000_000, 2_000_000_000
"""Bytes that a provenance and another product may have [ours]."""


def hashes(folder: Path, names: list[str]) -> dict[str, str]:
    """Name -> hash of what a stage has written, for its record."""
    return {name: hash_path(folder / name) for name in names if name not in SIDE}


def read_provenance(folder: Path) -> dict | None:
    """The record of a finished stage; None where there is none. A broken one is set aside, and it is said.

    `Interrupted` where it cannot be read just now.
    """
    path = folder / PROVENANCE
    try:
        record = read_json(path, _LARGEST_RECORD)
        if isinstance(record, dict) and isinstance(record.get("parts", {}), dict):
            return record
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise file_error(error) or error from None
    except ValueError:
        pass
    set_aside(path, "is no record of a finished stage")
    return None


def changed_products(folder: Path, record: dict) -> tuple[list[str], list[str]]:
    """Names of products that are (missing, another than the record says)."""
    told = record.get("products")
    known = told if isinstance(told, dict) else {}
    listed = record.get("files")
    names = [*known, *(name for name in (listed if isinstance(listed, list) else ()) if name not in (*SIDE, *known))]
    missing, changed = [], []
    for name in names:
        path = inside(folder, name)
        if path is None:
            continue
        if not os.path.lexists(path):
            missing.append(name)
        elif name in known and _hash(path) != known[name]:
            changed.append(name)
    return missing, changed


def _hash(path: Path) -> str | None:
    """None for what cannot be hashed: a pipe, a link to nothing. `Interrupted` where it cannot be read just now."""
    try:
        return hash_path(path) if path.is_file() or path.is_dir() else None
    except OSError as error:
        raise file_error(error) or error from None


def read_product(folder: Path, name: str) -> Any:
    """The JSON value in a product of a finished stage. UserError where it is missing, or another than was written."""
    value = found_product(folder, name)
    if value is None:
        raise UserError(f"{folder / name} is missing or empty\nRun its stage again with --overwrite.")
    return value


def found_product(folder: Path, name: str) -> Any:
    """`read_product`, but None where there is no such file."""
    text = product_text(folder, name)
    try:
        return None if text is None else parse_json(text)
    except ValueError as error:
        raise UserError(f"{folder / name} is not valid JSON: {error}\nRun its stage again with --overwrite.") from None


def product_text(folder: Path, name: str) -> str | None:
    """The text of a product, None where there is no such file. UserError where it is not what its stage has written."""
    path = folder / name
    if not os.path.lexists(path):
        return None
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        if path.stat().st_size > _LARGEST_PRODUCT:
            raise ValueError(f"it has more than {_LARGEST_PRODUCT} bytes")
        text = path.read_bytes().decode()
    except OSError as error:
        raise file_error(error) or error from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}\nRun its stage again with --overwrite.") from None
    if is_as_written(folder, name) is False:
        raise UserError(f"{path} is not what its stage has written\nPut it back, or run the stage with --overwrite.")
    return text


def is_as_written(folder: Path, name: str) -> bool | None:
    """Whether a product has the hash that its stage's record says; None where no record says one."""
    record = (read_provenance(folder) or {}).get("products")
    known = record.get(name) if isinstance(record, dict) else None
    return None if known is None else _hash(folder / name) == known
