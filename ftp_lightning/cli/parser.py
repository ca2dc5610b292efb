"""From the fields of a settings class to flags, YAML keys and help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser

from ftp_lightning.cli.help import stage_help
from ftp_lightning.cli.messages import check_config_file, plain
from ftp_lightning.cli.settings import Settings
from ftp_lightning.errors import UserError
from ftp_lightning.stopping import Stopped

Chosen = TypeVar("Chosen", bound=Settings)
HELP = ("-h", "--help", "--help_all")


class Parser(ArgumentParser):
    """Raises a UserError where the arguments are wrong, without the usage."""

    settings_class: type[Settings]
    given: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> None:
        raise UserError(plain(message, self.settings_class, self.given))


class Listed:
    """Reads a list of `item` from `A,B`, `[A, B]`, a YAML list or a single value.

    An empty text is the empty list where `default` is another one; else it would be taken as not given.
    """

    def __init__(self, item: type, default: Sequence[Any] = ()):
        self.item, self.default = item, default

    def __call__(self, given: Any) -> list:
        if given is None or (isinstance(given, str) and not given.strip() and not self.default):
            raise ValueError("a list is empty or null: [] is the empty list")
        if isinstance(given, str):
            given = [part.strip(" '\"") for part in given.strip("[]()").split(",") if part.strip()]
        return [self.item(part) for part in (given if isinstance(given, list | tuple) else [given])]

    def __repr__(self) -> str:
        return f"list of {self.item.__name__}"

    __name__ = property(__repr__)  # argparse says "invalid NAME value"


def words(given: Any) -> str | None:
    """Text as it is given: a comment, a number or `null` on the command line is text too."""
    if isinstance(given, dict | list | tuple | set):
        raise ValueError(f"one text is needed, not a {type(given).__name__}")
    return None if given is None else str(given)


def as_given(given: Any) -> Any:
    """What the option reads itself, such as a list of kv modes in YAML."""
    return given


class Maybe:
    """A number, or `null` in so many words: what YAML takes for null on the command line (`#3`) is an error."""

    def __init__(self, kind: type):
        self.kind = kind

    def __call__(self, given: Any) -> Any:
        if given is None or (isinstance(given, str) and given.strip() == "null"):
            return None
        if isinstance(given, bool) or (self.kind is int and isinstance(given, float)):
            raise ValueError(f"{given} is not of type {self.kind.__name__}")
        return self.kind(given)

    def __repr__(self) -> str:
        return f"{self.kind.__name__} | null"

    __name__ = property(__repr__)


@cache
def _hints(settings_class: type[Settings]) -> dict[str, Any]:
    """The type of every field."""
    return get_type_hints(settings_class)


@cache
def parser_of(settings_class: type[Settings]) -> Parser:
    """One flag per field, with its type, default and help; `--config` may be given several times, later ones win."""
    parser = Parser(prog=f"ftp-lightning {settings_class.stage}", default_env=False, allow_abbrev=False, add_help=False)
    parser.settings_class = settings_class
    parser.add_argument("--config", action=ActionConfigFile)
    hints = _hints(settings_class)
    for field in fields(settings_class):
        raw = as_given if field.metadata["read"] else words
        kind = _kind(raw if field.metadata["raw"] else hints[field.name])
        default = cast(Any, field.default)
        if field.metadata["positional"]:
            parser.add_argument(field.name, nargs="*", type=str, default=list(default))
        else:
            _add(parser, field.name, kind, default)
    return parser


def _kind(hint: Any) -> Any:
    """What reads a value of this type: of texts and of numbers that may be null we read every word ourselves."""
    if hint in (str, str | None):
        return words
    return next((Maybe(kind) for kind in (int, float) if hint == kind | None), hint)


def _add(parser: Parser, name: str, kind: Any, default: Any) -> None:
    if kind is bool:  # --name, --no_name, --name=true
        yes_no = ActionYesNo(yes_prefix="", no_prefix="no_")
        parser.add_argument(f"--{name}", action=yes_no, nargs="?", default=default)
    elif get_origin(kind) is tuple:
        parser.add_argument(f"--{name}", type=Listed(get_args(kind)[0], default), default=list(default))
    else:
        parser.add_argument(f"--{name}", type=kind, default=default)


def underscored(arguments: Sequence[str]) -> list[str]:
    """The arguments with every hyphen in a flag's name as an underscore: `--max-new-tokens=4` -> `--max_new_tokens=4`.

    Values, and all words behind `--`, stay as they are.
    """
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    return [_underscored(word) for word in arguments[:end]] + list(arguments[end:])


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def parse_settings(settings_class: type[Chosen], arguments: Sequence[str]) -> Chosen | None:
    """The settings, or None where the parser has answered itself (`--help`, `--help_all`, `--print_config`).

    UserError names an unknown key, an impossible value, a missing or broken config file.
    """
    arguments = underscored(arguments)
    if asked := [word for word in arguments if word in HELP]:
        print(stage_help(settings_class, everything="--help_all" in asked))
        return None
    parser = parser_of(settings_class)
    parser.given = arguments
    for file in _config_files(arguments):
        check_config_file(file, settings_class)
    try:
        namespace = parser.parse_args(list(arguments))
    except Stopped:
        raise
    except SystemExit as finished:
        if finished.code:
            remedy = f"`ftp-lightning {settings_class.stage} --help_all` lists them."
            raise UserError(f"the arguments were not understood\n{remedy}") from None
        return None
    values = {field.name: namespace[field.name] for field in fields(settings_class)}
    hints = _hints(settings_class)
    for name, value in values.items():
        if value is None and type(None) not in get_args(hints[name]):
            raise UserError(f"{name} is null\nGive --{name} a value, or leave it out.")
    return settings_class(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _config_files(arguments: Sequence[str]) -> list[str]:
    """What --config names, in the order given."""
    following = [after for word, after in zip(arguments, arguments[1:]) if word == "--config"]
    return following + [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
