"""The checkpoints of a router training: written whole, and read only where their checksums are right."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ftp_lightning.errors import UserError, file_error
from ftp_lightning.fingerprint import digest
from ftp_lightning.whole_files import set_aside, write_bytes

LAST, BEST, HISTORY = "last.ckpt", "best.ckpt", "history.jsonl"


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are written beside their place: Lightning writes them in TMPDIR, which may be another disk, from
    where they are copied piece by piece."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(Path(path), content.getvalue())


def step_to_resume(place: Path, fingerprint: str) -> int | None:
    """The step to go on from, None where there is none. Files that are proven broken are set aside.

    `Interrupted` where one cannot be read just now, UserError where they are those of another training.
    """
    if not (place / LAST).exists():
        _remove_history(place)
        return None
    last = _sound_or_aside(place / LAST)
    best = _sound_or_aside(place / BEST) if (place / BEST).exists() else last
    if last is not None and (not fingerprint or last.get("fingerprint") != fingerprint):
        raise UserError(
            f"{place} holds checkpoints of another training\n"
            "Resume it with its own settings, give another --output, or --overwrite to discard it."
        )
    if last is not None and best is not None:
        if last.get("history") == _digest_of(place / HISTORY, last["global_step"]):
            return last["global_step"]
        if (place / HISTORY).exists():
            set_aside(place / HISTORY, "is broken, so training begins anew")
    for name in (LAST, BEST):
        if (place / name).exists():
            set_aside(place / name, "cannot be used without what is broken")
    _remove_history(place)
    return None


def _remove_history(place: Path) -> None:
    """Of a training that has no checkpoint, from which it would be resumed."""
    (place / HISTORY).unlink(missing_ok=True)


def _sound_or_aside(path: Path) -> dict | None:
    """The checkpoint in a file; None where it is proven broken, and then it is set aside."""
    try:
        return sound(path)
    except OSError as error:
        if told := file_error(error):
            raise told from error
    except Exception:  # torch and zipfile raise a dozen kinds for a broken file
        pass
    set_aside(path, "is broken, so training begins anew")
    return None


def _digest_of(path: Path, done: int) -> str | None:
    try:
        return history_digest(read_history(path, done))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise file_error(error) or error from None
    except (ValueError, KeyError, TypeError):
        return None


def sound(path: Path) -> dict:
    """The checkpoint in a file whose checksums are right: torch writes them and does not look at them."""
    with zipfile.ZipFile(path) as parts:
        if parts.testzip() is not None:
            raise ValueError(f"{path} is broken")
    return torch.load(path, weights_only=True)


def read_history(path: Path, done: int) -> tuple[list[dict], list[dict]]:
    """(steps, validations) up to step `done`; the last line may be half a line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [row for row in (json.loads(line) for line in lines if line.endswith("}")) if row["step"] <= done]
    return [row for row in rows if "kl" not in row], [row for row in rows if "kl" in row]


def history_digest(history: tuple[list[dict], list[dict]]) -> str:
    return digest(json.dumps(history).encode())
