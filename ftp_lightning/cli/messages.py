"""What the command line says of wrong arguments: what is wrong, and what to give instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ftp_lightning.cli.flags import choices_of
from ftp_lightning.cli.settings import Settings
from ftp_lightning.errors import UserError
from ftp_lightning.named_file import LARGEST_YAML, read_named_text

_KEY = re.compile(r"""(?:Parser key "|argument --)(\w+)""")
_UNKNOWN = re.compile(r"unrecognized arguments: (.*)")


def plain(message: str, settings_class: type[Settings], given: Sequence[str]) -> str:
    """Two lines for a message of the parser.

    Args:
        message: what jsonargparse or argparse says.
        settings_class: the stage's settings.
        given: the arguments of the command line.
    """
    if unknown := _UNKNOWN.search(message):
        return _unknown(unknown[1].split()[0], settings_class)
    key, hints = _KEY.search(message), get_type_hints(settings_class)
    if key is None or key[1] not in hints:
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        return f"{' '.join(lines[:3])}\n{_all_flags(settings_class)}"
    name, wanted = key[1], expected(hints[key[1]])
    if "expected one argument" in message or "expected at least one" in message:
        return f"--{name} needs a value\nGive {wanted}: --{name} VALUE."
    value = _value_of(name, given, message)
    remedy = f"Change --{name} or the key {name} of the config file."
    if percent := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", value):
        remedy = f"Give --{name} {float(percent[1]) / 100:g}."
    elif near := difflib.get_close_matches(value, choices_of(hints[name]), 1, 0.7):
        remedy = f"Did you mean --{name} {near[0]}?"
    return f"{name} is {value!r}, must be {wanted}\n{remedy}"


def shown(error: UserError) -> str:
    """At most three lines of an error; those after the first are whole sentences."""
    first, *rest = str(error).splitlines()[:3]
    return "\n".join([first, *map(_sentence, rest)])


def _sentence(line: str) -> str:
    line = line.strip()
    end = "" if not line or line[-1] in ".?!…:" else "."
    return line[:1].upper() + line[1:] + end


def expected(kind: Any) -> str:
    """What a flag of this type takes, in words: "a whole number", "one of a, b"."""
    options = [option for option in get_args(kind) if option is not type(None)]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, options))}"
    if get_origin(kind) is tuple:
        return {int: "whole numbers, as 1,2", float: "numbers, as 0.2,0.4"}.get(options[0], "words, as A,B")
    if options:
        return " or ".join(map(expected, options))
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "text")


def nearest(word: str, known: Sequence[str]) -> list[str]:
    """At most five of `known` that `word` is likely to mean: misspelt, or a part of the name."""
    close = difflib.get_close_matches(word, known, 2, 0.7)
    parts = [name for name in known if len(word) > 3 and (name.endswith(f"_{word}") or name.startswith(f"{word}_"))]
    return list(dict.fromkeys([*close, *parts]))[:5]


def check_config_file(file: str, settings_class: type[Settings]) -> None:
    """UserError, with the file's name, for a config file that is missing, no YAML, or has keys that are no settings.

    The parser also takes settings that are written out in place of a file: `{budget: 0.3}`.
    """
    import yaml

    from ftp_lightning.yaml_file import load_yaml

    try:
        found = load_yaml(file if file.startswith("{") else read_named_text(file, LARGEST_YAML), file)
    except UserError as error:
        raise UserError(f"the config file {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "context_mark", None) or getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())[:120]
        raise UserError(f"{file}{where}: {problem}\nCorrect the YAML; --print_config writes an example.") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no settings\nWrite one KEY: VALUE per line; --print_config writes an example.")
    known = [item.name for item in fields(settings_class)]
    for key in found:
        if key not in (*known, "config"):
            raise UserError(f"{file}: `{settings_class.stage}` has no setting {key!r}\n{_guess(str(key), known, '')}")


def _unknown(word: str, settings_class: type[Settings]) -> str:
    """An argument that the stage does not know."""
    stage, known = settings_class.stage, [item.name for item in fields(settings_class)]
    if not word.startswith("-"):
        flag = "model" if "model" in known else "output"
        return f"{word!r} stands without a flag\nDid you mean --{flag} {word}? {_all_flags(settings_class)}"
    name = word.lstrip("-").split("=")[0]
    guess = _guess(name.removeprefix("no_"), known, "--")
    return f"`{stage}` has no flag --{name}\n{guess} {_all_flags(settings_class)}".replace("\n ", "\n")


def _guess(word: str, known: Sequence[str], prefix: str) -> str:
    near = nearest(word, known)
    return f"Did you mean {' or '.join(prefix + name for name in near)}?" if near else ""


def _all_flags(settings_class: type[Settings]) -> str:
    return f"`ftp-lightning {settings_class.stage} --help_all` lists all flags."


def _value_of(name: str, given: Sequence[str], message: str) -> str:
    """What was given for a flag: on the command line, else what the parser's message quotes."""
    said = [after for word, after in zip(given, [*given[1:], ""]) if word == f"--{name}"]
    said += [word.partition("=")[2] for word in given if word.startswith(f"--{name}=")]
    found = re.search(r"Got value: (.*)", message) or re.search(r"value: '(.*)'", message)
    quoted = found[1].strip() if found else "something else"
    return quoted if quoted in said or not said else said[-1]
