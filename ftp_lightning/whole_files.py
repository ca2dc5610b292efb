"""Files that are written whole or not at all, folders that are made for them, and broken files that are set aside."""

from __future__ import annotations

import glob
import itertools
import os
import platform
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ftp_lightning.errors import UserError, file_error


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. `Interrupted` where the system refuses."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise file_error(error) or error from None


def partial_folder(path: Path) -> Path:
    """A new folder beside `path`, to be written and then moved there; what killed processes of this machine have left
    of such folders is removed."""
    here = platform.node()
    for left in path.parent.glob(f".{glob.escape(path.name)}.*@{glob.escape(here)}.*.partial"):
        if not _runs(left.name.removeprefix(f".{path.name}.").partition("@")[0]):
            shutil.rmtree(left, ignore_errors=True)
    for number in itertools.count():
        place = path.with_name(f".{path.name}.{os.getpid()}@{here}.{number}.partial")
        with suppress(FileExistsError):  # of another thread, or of an earlier process that had this number
            place.mkdir(parents=True)
            return place
    raise AssertionError


def _runs(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except (PermissionError, ValueError):
        pass
    return True


def set_aside(path: Path, why: str) -> Path:
    """Rename a file that is proven broken, so that it is neither believed nor lost, and say so on stderr."""
    number = 1
    while (aside := path.with_name(f"{path.name}.broken-{number}")).exists():
        number += 1
    path.rename(aside)
    print(f"{path} {why}; it is kept as {aside.name}", file=sys.stderr)
    return aside


def inside(folder: Path, name: Any) -> Path | None:
    """The path of what `name`, which a file may say, names in `folder`; None where that would lie outside of it."""
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    path, root = folder / name, folder.resolve()
    plain = not Path(name).is_absolute() and ".." not in Path(name).parts and Path(name).parts
    return path if plain and root in (path.parent.resolve() / path.name).parents else None


def make_folder(path: Path) -> list[Path]:
    """Make a folder that can be written to. Returns the folders this call has created, outermost first.

    UserError where that is not possible; then nothing has been created.
    """
    made: list[Path] = []
    try:
        for folder in [folder for folder in (path, *path.parents) if not folder.exists()][::-1]:
            folder.mkdir()
            made.append(folder)
        probe = path / f".probe.{os.getpid()}.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        for folder in reversed(made):
            folder.rmdir()
        raise UserError(f"cannot write to the output folder {path}: {error.strerror}\nGive another --output.") from None
    return made


def remove_created(path: Path, created: list[Path]) -> None:
    """Remove `path` with all it holds where it is among `created`, then its created parents that are empty."""
    if path in created:
        shutil.rmtree(path, ignore_errors=True)
    for folder in reversed(created):
        if folder != path and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
