"""What `--help`, `--help_all` and `ftp-lightning` alone print."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import fields

from ftp_lightning.cli.flags import Flag, flags_of, grouped, important
from ftp_lightning.cli.settings import Settings

SECTIONS: dict[str, tuple[str, ...]] = {
    "Start here": ("try", "doctor", "generate"),
    "Prune a model": ("tune", "run", "sensitivity", "search", "train"),
    "Measure it": ("evaluate", "benchmark", "report"),
    "Use it elsewhere": ("serve", "export", "prefetch"),
    "Research": ("sweep", "trial"),
}
"""Heading -> stages, for the map of stages. A stage that stands nowhere comes under "More"."""

MORE = "More"
INDENT, COLUMN = 2, 30

COMMON = {
    "config": Flag("config", "FILE", "YAML file of settings; may be repeated, later ones win", ""),
    "print_config": Flag("print_config", "", "print all settings as YAML, and do nothing", ""),
}
"""Flags that every stage has beside its settings."""


def stage_map(stages: dict[str, tuple[str, str]]) -> str:
    """The map of stages that `ftp-lightning` alone prints. `stages`: name -> (its class, what it does)."""
    sections = {heading: [name for name in names if name in stages] for heading, names in SECTIONS.items()}
    placed = {name for names in sections.values() for name in names}
    sections[MORE] = [name for name in stages if name not in placed]
    lines = ["usage: ftp-lightning STAGE [--FLAG VALUE ...]", ""]
    for heading, names in sections.items():
        if names:
            lines += [heading, *(line for name in names for line in _row(name, stages[name][1], 14)), ""]
    lines += [
        "`ftp-lightning STAGE --help` shows the flags that matter most, `--help-all` shows all of them.",
        "`ftp-lightning --print_completion bash` (or zsh) prints a script that completes stages and flags.",
    ]
    return "\n".join(lines)


def stage_help(settings_class: type[Settings], everything: bool = False) -> str:
    """The help of one stage: its most used flags in groups, or all of them."""
    flags = flags_of(settings_class)
    shown = list(flags) if everything else important(settings_class)
    hidden = len(flags) - len(shown)
    docs = " ".join((settings_class.__doc__ or "").split("\n\n")[0].split())
    lines = [f"usage: ftp-lightning {settings_class.stage} {_words(settings_class)}[--FLAG VALUE ...]", ""]
    lines += [*textwrap.wrap(docs, _width()), ""]
    for group, names in grouped(shown).items():
        lines += [group, *(line for name in names for line in _flag_rows(flags[name])), ""]
    lines += ["All stages", *(line for flag in COMMON.values() for line in _flag_rows(flag))]
    lines += _row("--help, --help_all", _of_the_rest(hidden), COLUMN)
    return "\n".join([*lines, "", "Hyphens and underscores mean the same: --batch-size is --batch_size."])


def _of_the_rest(hidden: int) -> str:
    return f"this text; with all flags: {hidden} more" if hidden else "this text"


def _words(settings_class: type[Settings]) -> str:
    named = [item.name.upper() for item in fields(settings_class) if item.metadata["positional"]]
    return "".join(f"[{name} ...] " for name in named)


def _flag_rows(flag: Flag) -> list[str]:
    default = f" [{flag.default}]" if flag.default else ""
    return _row(flag.usage, flag.help + default, COLUMN)


def _row(left: str, right: str, column: int) -> list[str]:
    """Two columns; a long left side has a line of its own."""
    wrapped = textwrap.wrap(right, _width() - column, break_on_hyphens=False) or [""]
    rest = [" " * column + line for line in wrapped]
    start = " " * INDENT + left
    if len(start) + 2 > column:
        return [*textwrap.wrap(left, _width(), initial_indent=" " * INDENT, subsequent_indent=" " * 4), *rest]
    return [start.ljust(column) + wrapped[0], *rest[1:]]


def _width() -> int:
    return max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
