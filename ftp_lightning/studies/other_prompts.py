"""Prompts of kinds that no ready-made pruner was chosen or trained on; the model's own answer to each is what counts.

| kind | prompt | file in the task folder |
|---|---|---|
| few-shot | three answered questions of ARC-Easy and one without its answer | arc_easy_{train,test}.jsonl |
| choice | a question of MMLU and its four choices | mmlu_test.jsonl |
| story | the beginning of a HellaSwag text, to go on with | hellaswag_validation.jsonl |
| code | what does this function of Python's standard library do? | none |

Functions of one module are one document, every other prompt is one of its own.
"""

from __future__ import annotations

import inspect
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ftp_lightning.data.records import jsonl_records

EXAMPLES = 3
CODE_LINES = (10, 40)
"""Lines of a function that is asked about."""
MODULES = (
    "argparse", "ast", "bdb", "calendar", "cmd", "codecs", "configparser", "csv", "decimal", "difflib", "doctest",
    "fractions", "ftplib", "gettext", "heapq", "imaplib", "inspect", "ipaddress", "locale", "mailbox", "optparse",
    "pathlib", "pickle", "pprint", "random", "shutil", "statistics", "string", "tarfile", "tempfile", "textwrap",
    "threading", "tokenize", "traceback", "uuid", "zipfile",
)  # fmt: skip


def other_prompts(kind: str, folder: str, count: int) -> list[tuple[str, str]]:
    """`count` prompts of a kind: which document each is, and its words. UserError where a file is missing."""
    found = _shuffled(kind, folder)[:count]
    return [(f"{kind} {number if source is None else source}", prompt) for number, (source, prompt) in enumerate(found)]


@cache
def _shuffled(kind: str, folder: str) -> tuple[tuple[str | None, str], ...]:
    """Prompts of a kind in random order, each after what it comes from, None where no other prompt does."""
    found = [(None, one) if isinstance(one, str) else one for one in KINDS[kind](Path(folder).expanduser())]
    random.Random(kind).shuffle(found)
    return tuple(found)


def _few_shot(folder: Path) -> Iterator[str]:
    examples = jsonl_records(folder / "arc_easy_train.jsonl", _with_answer)
    rng = random.Random("examples")
    for question, _ in jsonl_records(folder / "arc_easy_test.jsonl", _with_answer):
        shown = (f"Question: {asked}\nAnswer: {answer}" for asked, answer in rng.sample(examples, EXAMPLES))
        yield "\n\n".join([*shown, f"Question: {question}\nAnswer:"])


def _with_answer(record: Any) -> tuple[str, str]:
    choices = record["choices"]
    return record["question"], choices["text"][choices["label"].index(record["answerKey"])]


def _choice(folder: Path) -> Sequence[str]:
    def prompt(record: Any) -> str:
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", record["choices"], strict=True))
        return f"{record['question']}\n{choices}\nWhich one is right, and why?"

    return jsonl_records(folder / "mmlu_test.jsonl", prompt)


def _story(folder: Path) -> Sequence[str]:
    return jsonl_records(
        folder / "hellaswag_validation.jsonl", lambda record: f"Go on with this text:\n\n{record['ctx']}"
    )


def _code(_: Path) -> Iterator[tuple[str, str]]:
    """After the module of each. The source files are read, and no module is imported."""
    import ast

    library = Path(sysconfig.get_path("stdlib"))
    for module in MODULES:
        source = (library / f"{module}.py").read_text(encoding="utf-8")
        written = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                lines = written[node.lineno - 1 : node.end_lineno]
                if CODE_LINES[0] <= len(lines) <= CODE_LINES[1]:
                    text = inspect.cleandoc("\n".join(["", *lines]))
                    yield module, f"What does this Python function do?\n\n{text}"


KINDS: dict[str, Callable[[Path], Any]] = {"few-shot": _few_shot, "choice": _choice, "story": _story, "code": _code}
