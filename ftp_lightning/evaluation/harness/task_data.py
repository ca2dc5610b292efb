"""Where the local files of lm-eval's tasks lie, and what their rows must be: the Hub's schema, one JSONL per split."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ftp_lightning.data.records import LONE_SURROGATE
from ftp_lightning.errors import UserError
from ftp_lightning.named_file import read_named_text

SPLITS = ("train", "validation", "test", "dev")
Files = dict[str, Path]
"""Split -> file."""

LAYOUT = "TASK.jsonl (all splits), TASK_SPLIT.jsonl or TASK/SPLIT.jsonl"


def find_files(task: str, folder: str | Path) -> Files:
    """The files of a task: `TASK.jsonl` for all splits, else `TASK_SPLIT.jsonl`, in the folder or one below it, else
    `TASK/SPLIT.jsonl`. A subject of MMLU lies in files of its own, or with the others in those of mmlu.

    UserError where there are none.
    """
    root = Path(folder).expanduser()
    found = _find(task, root) or (_find("mmlu", root) if task.startswith("mmlu_") else {})
    if not found:
        raise UserError(
            f"--task_data {folder} holds no {task}.jsonl\nPut {LAYOUT} there, in the Hub's schema, or leave --task_data"
            " out to ask the Hub."
        )
    return found


def _find(task: str, root: Path) -> Files:
    for place in (root, *sorted(path for path in root.glob("*") if path.is_dir())):
        if (place / f"{task}.jsonl").is_file():
            return dict.fromkeys(("train", "validation", "test", "dev"), place / f"{task}.jsonl")
        apart = {split: place / f"{task}_{split}.jsonl" for split in SPLITS}
        if place.name == task:
            apart |= {split: place / f"{split}.jsonl" for split in SPLITS if not apart[split].is_file()}
        if files := {split: path for split, path in apart.items() if path.is_file()}:
            return files
    return {}


def read_rows(task: str, path: Path, keys: tuple[str, ...] = ()) -> list[dict]:
    """The rows of a JSONL file; UserError naming the line where one is no JSON object or lacks a key the task reads."""
    try:
        lines = read_named_text(path).rstrip().split("\n")  # a text may hold other ends of lines
    except UserError as error:
        raise UserError(f"task {task}: {error}") from None
    if lines == [""]:
        raise UserError(f"task {task}: {path} has no rows")
    return [_row(task, path, number, line, keys) for number, line in enumerate(lines, start=1)]


def _row(task: str, path: Path, number: int, line: str, keys: tuple[str, ...]) -> dict:
    try:
        row = json.loads(line)
        missing = [key for key in keys if key not in row.keys()]
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"task {task}: {path}, line {number} {LONE_SURROGATE}") from None
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"task {task}: {path}, line {number} is not a JSON object") from None
    if missing:
        raise UserError(f"task {task}: {path}, line {number} has no {', '.join(missing)}")
    return row


def by_subject(files: Mapping[str, Path], folder: Path) -> dict[str, Files]:
    """MMLU's files parted by `subject`, written below `folder`: subject -> split -> file.

    Rows of files without that field belong to no subject: UserError.
    """
    parts: dict[str, dict[str, list[dict]]] = {}
    for split, path in files.items():
        for number, row in enumerate(read_rows("mmlu", Path(path), ("subject", "question", "choices", "answer")), 1):
            if not isinstance(row["subject"], str) or not re.fullmatch(r"[a-z0-9_]{1,80}", row["subject"]):
                raise UserError(
                    f"task mmlu: {path}, row {number}: {str(row['subject'])[:60]!r} is not a subject\n"
                    "A subject is written with small letters, digits and _, as abstract_algebra."
                )
            parts.setdefault(row["subject"], {}).setdefault(split, []).append(row)
    return {subject: _write(folder / subject, splits) for subject, splits in sorted(parts.items())}


def _write(folder: Path, splits: Mapping[str, list[dict]]) -> Files:
    folder.mkdir(parents=True)
    files = {split: folder / f"{split}.jsonl" for split in splits}
    for split, path in files.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in splits[split]), encoding="utf-8")
    return files
