"""What decides a result: hashes of files, folders and this package's code; versions and commit beside them."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
PACKAGES = ("ftp-lightning", "torch", "transformers", "lightning", "deap", "datasets", "lm_eval", "numpy")
PROVENANCE = "provenance.json"
_WHOLE = 64 * 2**20
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt")


def hash_path(path: Path, texts: str | None = None) -> str:
    """16 hex digits over a file's content, or the names and contents of a folder's files; the path does not count.

    Of weights beyond 64 MiB their size, first and last 32 MiB count [ours]: many GB are not read twice.

    Args:
        texts: a pattern: of a folder these files alone count, and none of its folders.
    """
    if path.is_file():
        return digest(_content(path))
    found = path.rglob("*") if texts is None else path.glob(texts)
    files = sorted(file for file in found if file.is_file() and file.name != PROVENANCE)
    return digest(*_named(path, files, _content))


@lru_cache(maxsize=1)
def code_version() -> str:
    """16 hex digits over the names and contents of this package's Python files."""
    files = sorted(PACKAGE.rglob("*.py"))
    return digest(*_named(PACKAGE, files, Path.read_bytes))


def git_commit() -> str | None:
    """The commit of the checkout this package lies in; None where it is installed elsewhere, or git cannot say."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    command = ["git", "-C", str(PACKAGE.parent), "rev-parse", "HEAD"]
    try:
        said = subprocess.run(command, capture_output=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.decode(errors="replace").strip() or None


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter, without importing them; None where one is not installed."""
    return {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}}


def version_of(package: str) -> str | None:
    """The version of an installed package, without importing it; None where it is not installed, or its `dist-info`
    cannot be read: that is no reason to end a run."""
    try:
        return version(package)
    except (PackageNotFoundError, KeyError, ValueError, OSError):
        return None


def digest(*parts: bytes) -> str:
    """16 hex digits of the sha256 over the parts; moving a boundary changes them."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "big") + part)
    return hashed.hexdigest()[:16]


def _named(folder: Path, files: list[Path], read: Callable[[Path], bytes]) -> Iterator[bytes]:
    for file in files:
        yield os.fsencode(file.relative_to(folder).as_posix())
        yield read(file)


def _content(file: Path) -> bytes:
    """The sha256 of what counts of a file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _WHOLE or file.suffix not in _WEIGHTS:
            return hashlib.file_digest(stream, "sha256").digest()
        hashed = hashlib.sha256(size.to_bytes(8, "big") + stream.read(_WHOLE // 2))
        stream.seek(-_WHOLE // 2, os.SEEK_END)
        hashed.update(stream.read())
        return hashed.digest()
