"""Records of JSON, JSONL and Hub data sets, each made one document, or what else a function makes of it."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ftp_lightning.errors import UserError, hub_errors
from ftp_lightning.json_file import parse_json, read_json

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

T = TypeVar("T")
LONGEST_LINE, LARGEST_ARRAY = 64 * 2**20, 2 * 2**30
"""Bytes of one record of JSONL, and of an array, which is read whole [ours]."""
LONE_SURROGATE = "holds half a character (a lone surrogate such as \\ud800)"


def record_text(record: Any) -> str:
    """The document of one record; ValueError (one line, no place) where it has no known form or is no valid text.

    * `{"text": T}` -> T;
    * `{"messages": [{"role": R, "content": C}, ...]}` -> `R: C` per message, a blank line between: plain text for any
      model;
    * `{"prompt": P}` or `{"prompt": P, "completion": C}` -> P, then C; both are text, or lists of messages;
    * `{"instruction": I, "input": X, "output": O}` -> the Stanford Alpaca prompt, then O if it is given. With an input
      the prompt is "Below is an instruction that describes a task, paired with an input that provides further context.
      Write a response that appropriately completes the request.", `### Instruction:`, I, `### Input:`, X, and
      `### Response:`; without one the shorter wording of the same.
    """
    return valid_text(_text(record))


def valid_text(text: str) -> str:
    """`text` itself; ValueError where it cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the text {LONE_SURROGATE}") from None
    return text


def _text(record: Any) -> str:
    if not isinstance(record, Mapping):
        raise ValueError(f"a record must be an object, not {type(record).__name__}")
    if "text" in record:
        return _string(record, "text")
    if "messages" in record:
        return chat_text(record["messages"])
    if "instruction" in record and ("output" in record or "prompt" not in record):
        return alpaca_prompt(record) + ("" if record.get("output") is None else _string(record, "output"))
    if "prompt" in record:
        return _prompt_text(record)
    raise ValueError(
        "a record needs 'text', 'messages', 'prompt' or 'instruction'; this one has " + ", ".join(sorted(record)[:6])
    )


def _prompt_text(record: Mapping[str, Any]) -> str:
    completion = record.get("completion")
    if not isinstance(record["prompt"], str):
        return chat_text([*_list(record["prompt"], "prompt"), *_list(completion or [], "completion")])
    return _string(record, "prompt") + ("" if completion is None else _string(record, "completion"))


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{key!r} must be a string or a list of messages, not {type(value).__name__}")
    return value


def alpaca_prompt(record: Mapping[str, Any]) -> str:
    """The Stanford Alpaca prompt of a record, up to and with `### Response:` and its line break."""
    fields = {"instruction": _string(record, "instruction"), "input": record.get("input") or ""}
    return (ALPACA_WITH_INPUT if fields["input"] else ALPACA_WITHOUT_INPUT).format(**fields)


def _string(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise ValueError(f"{key!r} must be a string, not {type(record[key]).__name__}")
    return record[key]


def chat_text(messages: Any) -> str:
    """`role: content` per message, a blank line between; messages whose content is null, as that of a call of a tool,
    are left out. ValueError where these are no messages, or their content is no text."""
    try:
        turns = [(message["role"], message["content"]) for message in messages]
    except (TypeError, KeyError):
        raise ValueError("'messages' must be a list of objects with 'role' and 'content'") from None
    turns = [(role, content) for role, content in turns if content is not None]
    for role, content in turns:
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"'role' and 'content' of a message must be texts; this one has {str(content)[:40]!r}")
    return "\n\n".join(f"{role}: {content}" for role, content in turns)


def jsonl_records(path: Path, make: Callable[[Any], T]) -> list[T]:
    """What `make` makes of every line's record; blank lines are skipped. Where it raises ValueError, or the line is
    broken, a UserError names file and line."""
    made = []
    with _opened(path) as lines:
        for number, line in enumerate(iter(partial(lines.readline, LONGEST_LINE + 1), b""), 1):
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path}, line {number} has more than {LONGEST_LINE} bytes\nRepair or remove the line")
            if line.strip():
                made.append(_line_record(path, number, line, make))
    return made


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file of records, a regular one. UserError where it cannot be read."""
    try:
        if not path.is_file():
            raise UserError(f"{path} is not a file\nGive the path of a JSONL file.")
        with path.open("rb") as lines:
            yield lines
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}\nGive a readable file.") from None


def _line_record(path: Path, number: int, line: bytes, make: Callable[[Any], T]) -> T:
    try:
        return make(parse_json(line))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are such
        raise UserError(f"{path}, line {number}: {error}\nRepair or remove the line") from None


def json_records(path: Path, make: Callable[[Any], T]) -> list[T]:
    """What `make` makes of every record of a JSON array. UserErrors name the file and the record."""
    try:
        records = read_json(path, LARGEST_ARRAY)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}\nfor one record per line name it .jsonl") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}\nGive a readable file.") from None
    if not isinstance(records, list):
        raise UserError(f"{path} must hold a JSON array of records, not {type(records).__name__}")
    return [_array_record(path, i, record, make) for i, record in enumerate(records, 1)]


def _array_record(path: Path, number: int, record: Any, make: Callable[[Any], T]) -> T:
    try:
        return make(record)
    except ValueError as error:
        raise UserError(f"{path}, record {number}: {error}\nRepair or remove the record") from None


def hub_records(name: str, make: Callable[[Any], T]) -> list[T]:
    """What `make` makes of the records of the Hub data set `NAME` or `NAME:CONFIG`: its `train` part, or the first."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    repository, _, config = name.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name):
        raise UserError(
            f"data source {name}: there is no such file, and no Hub data set has such a name\nGive a file or folder."
        )
    try:
        parts = load_dataset(repository, config or None)
    except hub_errors(OSError, ValueError, DatasetGenerationError) as error:
        raise UserError(
            f"data source {name}: there is no such file, and the Hub data set cannot be loaded ({_first_line(error)})\n"
            "Give a local file or folder, or where there is a network run: ftp-lightning prefetch --data " + name
        ) from None
    records = parts["train" if "train" in parts else next(iter(parts))]
    try:
        return [make(record) for record in records]
    except ValueError as error:
        raise UserError(f"data set {name}: {error}\nSave it as JSONL in such a form and give that file") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
