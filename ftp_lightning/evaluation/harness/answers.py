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

import torch

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
            self._path.parent.mkdir(parents=True, exist_ok=True)
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
        with open(self._path, "ab", buffering=0) as file:
            file.write(content)
            os.fsync(file.fileno())

    def __len__(self) -> int:
        return len(self._known)


def request_key(*parts) -> str:
    """32 hex digits of what was asked: tokens, and how."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def asked_identity(model, pruner, **more) -> str:
    """16 hex digits of who was asked: the model's weights and precision, all that the pruner is made of, this code,
    and `more`."""
    from ftp_lightning.models import model_identity

    who = {"model": model_identity(model), "dtype": str(model.dtype), "code": code_version(), **more}
    if pruner is not None:
        who |= {"pruner": type(pruner).__qualname__, "settings": pruner.settings(), **_plain(pruner)}
        who |= {"router": [type(pruner.router).__qualname__, _plain(pruner.router), pruner.router.state_dict()]}
        who |= {"compensation": None if pruner.compensation is None else pruner.compensation.tensors}
    return digest(json.dumps(who, sort_keys=True, default=_content).encode())


def _plain(thing) -> dict:
    """Its attributes, but for what belongs to torch, to a forward, or to a model it is attached to."""
    passing = ("training", "trace", "decisions", "gates", "router", "compensation")
    return {name: value for name, value in vars(thing).items() if not name.startswith("_") and name not in passing}


def _content(value):
    """What JSON cannot hold, by content: tensors by their bytes, modules by their weights, values by their fields."""
    if isinstance(value, torch.Tensor):
        return digest(str(tuple(value.shape)).encode(), value.detach().cpu().double().contiguous().numpy().tobytes())
    if isinstance(value, torch.nn.Module):
        return [type(value).__qualname__, _plain(value), value.state_dict()]
    plain = hasattr(value, "__dict__") and not callable(value)  # a function is known by its place alone: never again
    return [type(value).__qualname__, vars(value)] if plain else repr(value)


def _parsed(line: bytes) -> tuple[str, Answer] | None:
    try:
        key, value, sparsity, skipped, spent = json.loads(line)
        value = tuple(value) if isinstance(value, list) else value
        return key, Answer(value, sparsity, skipped, spent and Spent(*spent))
    except (ValueError, TypeError):
        return None
