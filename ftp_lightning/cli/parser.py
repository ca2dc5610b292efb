"""From the fields of a settings class to flags, YAML keys and help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser

from ftp_lightning.cli.settings import Settings
from ftp_lightning.errors import UserError

Chosen = TypeVar("Chosen", bound=Settings)


class Parser(ArgumentParser):
    """Says what is wrong in at most three lines, without the usage."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        raise UserError(f"{' '.join(lines[:3])}\n`{self.prog} --help` lists the keys and their values.")


class Listed:
    """Reads a list of `item` from `A,B`, `[A, B]`, a YAML list or a single value."""

    def __init__(self, item: type):
        self.item = item

    def __call__(self, given: Any) -> list:
        if isinstance(given, str):
            given = [part.strip(" '\"") for part in given.strip("[]()").split(",") if part.strip()]
        return [self.item(part) for part in (given if isinstance(given, list | tuple) else [given])]

    def __repr__(self) -> str:
        return f"list of {self.item.__name__}"

    __name__ = property(__repr__)  # argparse says "invalid NAME value"


def words(given: Any) -> str | None:
    """Text as it is given: a comment, a number or `null` on the command line is text too."""
    return None if given is None else str(given)


@cache
def parser_of(settings_class: type[Settings]) -> Parser:
    """One flag per field, with its type, default and help; `--config` may be given several times, later ones win."""
    parser = Parser(
        prog=f"ftp-lightning {settings_class.stage}",
        description=(settings_class.__doc__ or "").split("\n\n")[0],
        default_env=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML of settings; may be repeated, later ones win")
    hints = get_type_hints(settings_class)
    for field in fields(settings_class):
        kind, default = words if field.metadata["raw"] else hints[field.name], cast(Any, field.default)
        if field.metadata["positional"]:
            parser.add_argument(field.name, nargs="*", type=str, default=list(default), help=field.metadata["help"])
        else:
            _add(parser, field.name, kind, default, field.metadata["help"])
    return parser


def _add(parser: Parser, name: str, kind: Any, default: Any, help: str) -> None:
    if kind is bool:  # --name, --no_name, --name=true
        yes_no = ActionYesNo(yes_prefix="", no_prefix="no_")
        parser.add_argument(f"--{name}", action=yes_no, nargs="?", default=default, help=help)
    elif get_origin(kind) is tuple:
        kind_of_list = Listed(get_args(kind)[0])
        parser.add_argument(f"--{name}", type=kind_of_list, default=list(default), metavar="A,B", help=help)
    else:
        parser.add_argument(f"--{name}", type=kind, default=default, help=help)


def parse_settings(settings_class: type[Chosen], arguments: Sequence[str]) -> Chosen | None:
    """The settings, or None where the parser has answered itself (`--help`, `--print_config`).

    UserError names an unknown key, an impossible value, a missing or broken config file.
    """
    try:
        namespace = parser_of(settings_class).parse_args(list(arguments))
    except SystemExit as finished:
        if finished.code:
            remedy = f"`ftp-lightning {settings_class.stage} --help` lists them."
            raise UserError(f"the arguments were not understood\n{remedy}") from None
        return None
    values = {field.name: namespace[field.name] for field in fields(settings_class)}
    return settings_class(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
