"""lm-eval's tasks by name, without parsing the 14,000 YAML files that it comes with.

lm-eval builds its index by parsing all of them, which takes about 15 s of processor time in every process. Here the
files are scanned as text for the names they mention, and lm-eval parses only the folders of the tasks asked for.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

_FIELD = re.compile(r"""^["']?(?:task|group|tag)["']?[ \t]*:[ \t]*(\S.*)$""", re.MULTILINE)
_LIST_ITEM = re.compile(r"""^[ \t]*- +(?:["']?(?:task|group)["']?: *)?["']?([^\s"',]+)["',]*[ \t]*$""", re.MULTILINE)
_INCLUDE = re.compile(rb"""^include[ \t]*:[ \t]*["']?([^\s"']+)""", re.MULTILINE)
_NAME = re.compile(r"[\w.+()-]+")


def names_like(name: str) -> list[str]:
    """Up to six names of lm-eval's tasks, groups and tags that resemble `name`."""
    close = difflib.get_close_matches(name, sorted(_folders_of_names()), n=6)
    known = set(task_manager(close).all_tasks)
    return [one for one in close if one in known]


def task_manager(names: Iterable[str], metadata: dict[str, Any] | None = None):
    """lm-eval's `TaskManager` with the tasks, groups and tags called `names`, and all that belongs to them.

    Names that lm-eval does not know are missing from its `all_tasks`; other names may be there. `metadata`: what
    lm-eval hands to the makers of tasks.
    """
    return _manager(tuple(sorted(set(names))), json.dumps(metadata or {}, sort_keys=True))


@lru_cache(maxsize=16)
def _manager(names: tuple[str, ...], metadata: str):
    """Adds folders until every member of every group asked for has been looked for."""
    from lm_eval.tasks import TaskManager

    known = _folders_of_names() if names else {}
    wanted, folders, manager = set(names), set[str](), None
    while True:
        needed = folders.union(*(known.get(name, ()) for name in wanted))
        if manager is None or needed != folders:
            folders = needed
            # Of two entries with one name lm-eval keeps the first of one path, but the last of several paths.
            paths = [_root() / folder for folder in sorted(folders, key=lambda folder: f"{folder}/", reverse=True)]
            manager = TaskManager(include_defaults=False, include_path=paths, metadata=json.loads(metadata))
            _gather_tags(manager.task_index)
        members = set(_members(wanted, manager.task_index))
        if members <= wanted:
            return manager
        wanted |= members


def _gather_tags(index: dict[str, Any]) -> None:
    """A tag in several paths holds the tasks of all of them."""
    tasks: dict[str, set[str]] = {}
    for name, entry in index.items():
        if entry.kind.name in ("TASK", "PY_TASK"):
            for tag in entry.tags:
                tasks.setdefault(tag, set()).add(name)
    for name, entry in index.items():
        if entry.kind.name == "TAG":
            entry.tags = tasks.get(name, set())


def _members(names: Iterable[str], index: dict[str, Any]) -> Iterator[str]:
    """The names that the groups and tags among `names` consist of."""
    for entry in (index[name] for name in names if name in index):
        if entry.yaml_path is None:
            yield from entry.tags
        elif isinstance(tasks := (entry.cfg or {}).get("task"), list):
            yield from _named(tasks)


def _named(tasks: list[str | dict[str, Any]]) -> Iterator[str]:
    """The names in a group's list of tasks, and in the groups that stand inside it."""
    for task in tasks:
        if isinstance(task, str):
            yield task
        elif isinstance(inner := task.get("task"), list):
            yield from [task["group"], *_named(inner)]
        else:
            yield inner or task["group"]


@lru_cache(maxsize=1)
def _folders_of_names() -> dict[str, set[str]]:
    """Name -> the folders, right under lm-eval's tasks, whose files mention it as a task, group or tag."""
    found: dict[str, set[str]] = {}
    for folder in os.scandir(_root()):
        if folder.is_dir():
            for name in _names_in(Path(folder.path)):
                found.setdefault(name, set()).add(folder.name)
    return found


def _names_in(folder: Path) -> set[str]:
    """The names in a folder's files, and in the files of other folders that these include."""
    texts = dict(_texts(str(folder)))
    open_ends = [path for path, text in texts.items() if b"../" in text]
    while open_ends:
        path = open_ends.pop()
        for target in _INCLUDE.findall(texts[path]):
            there = os.path.normpath(os.path.join(os.path.dirname(path), target.decode()))
            if there not in texts and os.path.isfile(there):
                texts[there] = Path(there).read_bytes()
                open_ends.append(there)
    whole = b"\n".join(texts.values()).decode("utf-8", errors="replace")
    fields = (name for value in _FIELD.findall(whole) for name in _NAME.findall(value))
    return {*fields, *_LIST_ITEM.findall(whole)}


def _texts(folder: str) -> Iterator[tuple[str, bytes]]:
    for parent, _, files in os.walk(folder):
        for file in files:
            if file.endswith(".yaml") or "." not in file:
                path = os.path.join(parent, file)
                with open(path, "rb") as stream:
                    yield path, stream.read()


def _root() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent
