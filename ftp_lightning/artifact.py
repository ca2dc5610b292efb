"""What a stage leaves on disk: a folder that is finished or not, never half-written files.

`provenance.json` is written last: it is the mark of completion, and its fingerprint of settings, inputs and code
decides whether the stage has to be run again.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from ftp_lightning.errors import Interrupted, UserError, file_error
from ftp_lightning.fingerprint import PROVENANCE, code_version, digest, git_commit, versions
from ftp_lightning.json_file import read_json
from ftp_lightning.lock import Lock
from ftp_lightning.products import changed_products, hashes, read_provenance
from ftp_lightning.whole_files import inside, make_folder, remove, remove_created, set_aside, write_text

STATE, UNFINISHED, LOCK, CONFIG = "state.json", "unfinished.json", ".lock", "config.yaml"
KEPT = (STATE, "checkpoints")
"""What an unfinished stage is resumed from."""
_LARGEST_RECORD, _LARGEST_STATE = 64_000_000, 2_000_000_000
"""Bytes that the record of an unfinished stage and a saved state may have [ours]."""


class StageFolder:
    """The folder of one stage, as a context.

    Entering checks that it can be written and what is in it. `finished` is True where the same stage is done already
    and its products are those that its record names; missing ones are made again, and changed ones are refused. A
    finished or unfinished stage of another fingerprint is refused with the difference, unless `overwrite`. Leaving
    without an exception writes config.yaml and provenance.json. After a UserError nothing stays that this call has
    created; after any other end a saved state stays to resume from.

    Args:
        path: the folder; made if it is not there.
        config: all settings, written as config.yaml.
        identity: the settings that decide the result, inputs by their hashes; with the code version, the fingerprint.
        command: a command line that gives these settings.
    """

    def __init__(self, path: Path, stage: str, config: dict, identity: dict, command: str, overwrite: bool = False):
        self.path, self.stage, self.config, self.command, self.overwrite = Path(path), stage, config, command, overwrite
        self.parts = {"stage": stage, **identity, "code": code_version()}
        self.fingerprint = _fingerprint(self.parts)
        self.finished = False
        self._files: list[str] = []
        self._created: list[Path] = []
        self._resumes = False
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
        except BaseException as error:
            self._lock.free()
            told = file_error(error)
            if told is None:
                raise
            raise told from error

    def _entered(self) -> StageFolder:
        for pattern in (".*.partial", "*/.*.partial", ".*.old"):  # of one killed while it wrote
            for left in self.path.glob(pattern):
                remove(left)
        former = read_provenance(self.path)
        if former is None:
            self._check_unfinished()
        else:
            for name in (STATE, UNFINISHED):  # of a run that was killed after its last file
                (self.path / name).unlink(missing_ok=True)
            self.finished = not self.overwrite and self._is_done(former)
        self._resumes = any((self.path / name).exists() for name in (*KEPT, UNFINISHED))
        return self

    def _is_done(self, former: dict) -> bool:
        """Whether all products of this stage are there. UserError where it is another one, or one was changed."""
        if former.get("fingerprint") != self.fingerprint:
            difference = _difference(former.get("parts", {}), self.parts)
            raise UserError(
                f"{self.path} holds a finished stage with other settings: {difference}\n"
                "Give another --output, or --overwrite to run it again here."
            )
        missing, changed = changed_products(self.path, former)
        if set((*missing, *changed)) == {CONFIG}:
            self._write_config()
            return True
        if changed:
            raise UserError(
                f"{self.path / changed[0]} is not what this finished stage has written\n"
                "Put it back, or --overwrite to run the stage again."
            )
        if missing:
            print(
                f"{self.stage}: {', '.join(missing[:3])} of a finished stage is missing; making it again",
                file=sys.stderr,
            )
        return not missing

    def _check_unfinished(self) -> None:
        """UserError where another stage is unfinished here; with `overwrite` what it had saved is removed."""
        kept = [name for name in KEPT if (self.path / name).exists()]
        begun = self._begun() if kept else None
        if begun is None or begun["fingerprint"] == self.fingerprint:
            return
        if not self.overwrite:
            difference = _difference(begun["parts"], self.parts)
            raise UserError(
                f"{self.path} holds an unfinished stage with other settings: {difference}\n"
                "Resume it with its own settings, give another --output, or --overwrite to discard it."
            )
        for name in (*kept, UNFINISHED):
            remove(self.path / name)

    def _begun(self) -> dict | None:
        """Which stage is unfinished here, None where that is not said; a broken record is set aside."""
        path = self.path / UNFINISHED
        try:
            found = read_json(path, _LARGEST_RECORD)
            if found["fingerprint"] == _fingerprint(found["parts"]):
                return found
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            pass
        set_aside(path, "is broken")
        return None

    def _begin(self) -> None:
        """Say whose progress is about to be saved here."""
        if not (self.path / UNFINISHED).exists():
            record = {"fingerprint": self.fingerprint, "parts": self.parts}
            write_text(self.path / UNFINISHED, json.dumps(record, default=str))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        told = file_error(error)
        try:
            if kind is None and not self.finished:
                self._finish()
            elif kind is not None and not (_may_resume(kind) and self._resumable()):
                self._take_back()
        except OSError as failed:
            told = told or file_error(failed)
            if told is None:
                raise
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
            raise ValueError(f"{name!r} is not the name of a file in {self.path}")
        if not self._files:
            self._forget_former()
        if name in KEPT:
            self._begin()
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
        self._begin()
        text = json.dumps(state)
        record = {"fingerprint": self.fingerprint, "sha256": digest(text.encode()), "state": text}
        write_text(self.path / STATE, json.dumps(record))

    def load_state(self) -> Any:
        """The state saved by an interrupted run of this very fingerprint, else None. A broken one is set aside.

        `Interrupted` where it cannot be read just now, UserError where it is the state of other settings.
        """
        path = self.path / STATE
        try:
            saved = read_json(path, _LARGEST_STATE)
            sound = saved["sha256"] == digest(saved["state"].encode())
            if sound and saved["fingerprint"] == self.fingerprint:
                return json.loads(saved["state"])
        except FileNotFoundError:
            return None
        except OSError as error:
            raise file_error(error) or error from None
        except (ValueError, KeyError, TypeError, AttributeError):
            sound = False
        if sound and not (self.path / UNFINISHED).exists() and not self.overwrite:
            raise UserError(
                f"{path} is the state of other settings, or of other code of this package\n"
                "Resume it with these, give another --output, or --overwrite to discard it."
            )
        set_aside(path, "is broken, so this stage begins anew" if not sound else "is of other settings")
        return None

    def _forget_former(self) -> None:
        """No provenance means not finished, so it goes first; then the former products, which need not come again."""
        former = read_provenance(self.path) or {}
        (self.path / PROVENANCE).unlink(missing_ok=True)
        listed = former.get("files")
        for path in (inside(self.path, name) for name in (listed if isinstance(listed, list) else ())):
            if path is not None:
                remove(path)

    def _resumable(self) -> bool:
        return (self.path / STATE).exists() or any(self.path.rglob("*.ckpt"))

    def _finish(self) -> None:
        self.place(CONFIG)
        self._write_config()
        files = sorted(name for name in self._files if (self.path / name).exists())
        record = {
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "parts": self.parts,
            "files": files,
            "products": hashes(self.path, files),
            "command": self.command,
            "seed": self.config.get("seed"),
            "commit": git_commit(),
            "versions": versions(),
            "seconds": round(time.monotonic() - self._started, 1),
        }
        write_text(self.path / PROVENANCE, json.dumps(record, indent=1, default=str) + "\n")
        for name in (STATE, UNFINISHED):
            (self.path / name).unlink(missing_ok=True)

    def _take_back(self) -> None:
        """Remove what this call has created; progress that it came upon stays."""
        remove_created(self.path, self._created)
        if not self._resumes:
            for name in (*KEPT, UNFINISHED):
                remove(self.path / name)

    def _write_config(self) -> None:
        import yaml

        write_text(self.path / CONFIG, yaml.safe_dump(self.config, sort_keys=False))


def _fingerprint(parts: dict) -> str:
    return digest(json.dumps(parts, sort_keys=True, default=str).encode())


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
