"""What a stage leaves on disk: a folder that is finished or not, never half-written files.

`provenance.json` is written last: it is the mark of completion, and its fingerprint of settings, inputs and code
decides whether the stage has to be run again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from ftp_lightning.errors import Interrupted, UserError, unwritable
from ftp_lightning.fingerprint import PROVENANCE, code_version, digest, git_commit, versions
from ftp_lightning.json_file import read_json

STATE, LOCK = "state.json", ".lock"
_LARGEST_RECORD, _LARGEST_STATE = 64_000_000, 2_000_000_000
"""Bytes that a provenance and a saved state may have [ours]."""


class StageFolder:
    """The folder of one stage, as a context.

    Entering checks that it can be written and what is in it: `finished` is True where the same stage is done already;
    a finished stage of another fingerprint is refused with the difference, unless `overwrite`. Leaving without an
    exception writes config.yaml and provenance.json. After a UserError nothing stays that this call has created; after
    any other end a saved state stays to resume from.

    Args:
        path: the folder; made if it is not there.
        config: all settings, written as config.yaml.
        identity: the settings that decide the result, inputs by their hashes; with the code version, the fingerprint.
        command: a command line that gives these settings.
    """

    def __init__(self, path: Path, stage: str, config: dict, identity: dict, command: str, overwrite: bool = False):
        self.path, self.stage, self.config, self.command, self.overwrite = Path(path), stage, config, command, overwrite
        self.parts = {"stage": stage, **identity, "code": code_version()}
        self.fingerprint = digest(json.dumps(self.parts, sort_keys=True, default=str).encode())
        self.finished = False
        self._files: list[str] = []
        self._created: list[Path] = []
        self._started = time.monotonic()
        self._lock = Lock(self.path / LOCK)

    def __getstate__(self) -> dict:
        """For a copy in another process, which the lock does not go with."""
        return self.__dict__ | {"_lock": None}

    def __enter__(self) -> StageFolder:
        self._created = make_folder(self.path)
        if not self._lock.take():
            raise UserError(f"another run is at work in {self.path}\nWait for it, stop it, or give another --output.")
        try:
            return self._entered()
        except BaseException:
            self._lock.free()
            raise

    def _entered(self) -> StageFolder:
        former = read_provenance(self.path)
        if former:
            (self.path / STATE).unlink(missing_ok=True)  # of a run that was killed after its last file
        for left in (*self.path.glob(".*.partial"), *self.path.glob(".*.old")):  # of one killed while it wrote
            _remove(left)
        if former and not self.overwrite:
            self.finished = former.get("fingerprint") == self.fingerprint
            if not self.finished:
                difference = _difference(former.get("parts", {}), self.parts)
                raise UserError(
                    f"{self.path} holds a finished stage with other settings: {difference}\n"
                    "Give another --output, or --overwrite to run it again here."
                )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        told = unwritable(error)
        try:
            if kind is None and not self.finished:
                self._finish()
            elif self._created and kind is not None and not (_may_resume(kind) and self._resumable()):
                remove_created(self.path, self._created)
        except OSError as failed:
            if unwritable(failed) is None:
                raise
            told = told or unwritable(failed)
        finally:
            self._lock.free()
        if told is not None:
            raise told from error

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        write_text(self.place(name), text)

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON; numbers that are not finite become null."""
        self.write_text(name, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")

    def place(self, name: str) -> Path:
        """The path for somebody else's file or folder; the first of a new run takes the former run's away."""
        if inside(self.path, name) is None:
            raise ValueError(f"{name!r} is no name of a file in {self.path}")
        if not self._files:
            self._forget_former()
        if name not in self._files:
            self._files.append(name)
        return self.path / name

    @property
    def files(self) -> list[str]:
        """Names of what was written so far."""
        return list(self._files)

    def adopt(self, names: list[str]) -> None:
        """Files that another process wrote here through its copy of this object."""
        self._files = list(dict.fromkeys([*self._files, *names]))

    def save_state(self, state: Any) -> None:
        """What an interrupted stage resumes from; gone when it is finished."""
        if not self._files:
            self._forget_former()
        text = json.dumps(state)
        record = {"fingerprint": self.fingerprint, "sha256": digest(text.encode()), "state": text}
        write_text(self.path / STATE, json.dumps(record))

    def load_state(self) -> Any:
        """The state saved by an interrupted run of this very fingerprint, else None, also where a bit of it flipped."""
        try:
            saved = read_json(self.path / STATE, _LARGEST_STATE)
            if saved["fingerprint"] == self.fingerprint and saved["sha256"] == digest(saved["state"].encode()):
                return json.loads(saved["state"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        return None

    def _forget_former(self) -> None:
        """No provenance means not finished, so it goes first; then the former products, which need not come again."""
        former = read_provenance(self.path) or {}
        (self.path / PROVENANCE).unlink(missing_ok=True)
        listed = former.get("files")
        for path in (inside(self.path, name) for name in (listed if isinstance(listed, list) else ())):
            if path is not None:
                _remove(path)

    def _resumable(self) -> bool:
        return (self.path / STATE).exists() or any(self.path.rglob("*.ckpt"))

    def _finish(self) -> None:
        import yaml

        self.write_text("config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        record = {
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "parts": self.parts,
            "files": sorted(name for name in self._files if (self.path / name).exists()),
            "command": self.command,
            "seed": self.config.get("seed"),
            "commit": git_commit(),
            "versions": versions(),
            "seconds": round(time.monotonic() - self._started, 1),
        }
        write_text(self.path / PROVENANCE, json.dumps(record, indent=1, default=str) + "\n")
        (self.path / STATE).unlink(missing_ok=True)


class Lock:
    """One run at a time in a folder: a file that the kernel unlocks when its holder dies, by whatever death."""

    def __init__(self, path: Path):
        self.path = path
        self.file: BufferedIOBase | None = None

    def take(self, wait: bool = False) -> bool:
        """False where another holds it; with `wait` that one is waited for. True also on a file system without locks:
        there is none to respect [ours]."""
        while True:
            self.file = self.path.open("ab")
            try:
                import fcntl

                fcntl.flock(self._opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                self._close()
                return False
            except (OSError, ImportError):
                return True
            if self._is_there():
                return True
            self._close()  # its holder has taken it away between our opening and our locking

    def free(self) -> None:
        if self.file is not None:
            self.path.unlink(missing_ok=True)
            self._close()

    def _is_there(self) -> bool:
        """Whether the file that was opened still lies where others look for it."""
        try:
            return os.path.samestat(os.fstat(self._opened.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    @property
    def _opened(self) -> BufferedIOBase:
        assert self.file is not None
        return self.file

    def _close(self) -> None:
        self._opened.close()
        self.file = None


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """One process at a time at work on `place`, machine-wide; others wait, and a process that dies lets go."""
    make_folder(place.parent)
    lock = Lock(place.parent / f".{place.name}.lock")
    lock.take(wait=True)
    try:
        yield
    finally:
        lock.free()


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
    missing = [folder for folder in (path, *path.parents) if not folder.exists()][::-1]
    made: list[Path] = []
    try:
        for folder in missing:
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


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise unwritable(error) or error from None
    finally:
        partial.unlink(missing_ok=True)


def read_provenance(folder: Path) -> dict | None:
    """The provenance of a finished stage; None where there is none that can be read."""
    try:
        record = read_json(folder / PROVENANCE, _LARGEST_RECORD)
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _may_resume(kind: type[BaseException]) -> bool:
    """Whether the same command may come to a good end: bad input stays bad."""
    return issubclass(kind, Interrupted) or not issubclass(kind, UserError)


def _difference(former: dict, now: dict) -> str:
    """What differs, in words; `former` was read from JSON, which knows no tuples."""
    now = json.loads(json.dumps(now, default=str))
    keys = [key for key in {**former, **now} if former.get(key) != now.get(key)]
    shown = [_change(key, former.get(key), now.get(key)) for key in keys[:4]]
    return ", ".join(shown + ["..."] * (len(keys) > 4))


def _change(key: str, former: Any, now: Any) -> str:
    return "the package's code changed" if key == "code" else f"{key} {former} -> {now}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
