"""Answers on disk as they are found, by the content of what was asked and of what was asked it [ours].

A file is named by the hash of the model, the pruner and the mode; a line by that of the tokens. So nothing that was
answered is asked again: not after a kill, and not by another run that asks the same of the same model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from ftp_lightning.evaluation.harness.accounts import Answer, Spent
from ftp_lightning.fingerprint import code_version, digest


class AnswerBook:
    """`folder`/IDENTITY.RANK.jsonl, read with those of all other ranks; without a folder nothing is kept.

    Answers are written batch by batch, in one call each, so that a batch is there whole or not at all; a line that a
    kill has cut is passed over.
    """

    def __init__(self, folder: str | Path | None = None, identity: str = "", rank: int = 0):
        self._known: dict[str, Answer] = {}
        self._path = None if folder is None else Path(folder).expanduser() / f"{identity}.{rank}.jsonl"
        if self._path is not None:
            for path in sorted(self._path.parent.glob(f"{identity}.*.jsonl")):
                self._known |= dict(filter(None, map(_parsed, path.read_bytes().splitlines())))

    def get(self, key: str) -> Answer | None:
        return self._known.get(key)

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Keep the answers of one batch."""
        if self._path is None:
            return
        self._known |= answers
        lines = [json.dumps([key, a.value, a.sparsity, a.skipped, a.spent]) for key, a in answers.items()]
        # Begins with a line's end: what a kill left of the line before cannot spoil this one.
        content = "\n".join(["", *lines, ""]).encode()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "ab", buffering=0) as file:
            file.write(content)
            os.fsync(file.fileno())

    def __len__(self) -> int:
        return len(self._known)


def request_key(*parts) -> str:
    """32 hex digits of what was asked: tokens, and how."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def asked_identity(model, pruner, **more) -> str:
    """16 hex digits of who was asked: the model and its precision, the pruner, this code, and `more`.

    Args:
        model: its weights, its dtype and the kernel of its attention count.
        pruner: a TokenPruner, by its `identity`, or None.
        more: JSON-able.
    """
    from ftp_lightning.models import model_identity

    kernel = getattr(model.config, "_attn_implementation", None)
    who = {
        "model": model_identity(model),
        "dtype": str(model.dtype),
        "attention_kernel": kernel,
        "code": code_version(),
    }
    who |= {"pruner": None if pruner is None else pruner.identity(), **more}
    return digest(json.dumps(who, sort_keys=True).encode())


def _parsed(line: bytes) -> tuple[str, Answer] | None:
    try:
        key, value, sparsity, skipped, spent = json.loads(line)
        value = tuple(value) if isinstance(value, list) else value
        return key, Answer(value, sparsity, skipped, spent and Spent(*spent))
    except (ValueError, TypeError):
        return None
