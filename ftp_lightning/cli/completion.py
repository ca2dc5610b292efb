"""Scripts that complete stages and flags in a shell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import get_type_hints

from ftp_lightning.cli.flags import choices_of, flags_of
from ftp_lightning.cli.settings import Settings
from ftp_lightning.errors import UserError

SHELLS = ("bash", "zsh")

_SCRIPT = """{zsh}_ftp_lightning() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then words="{stages}"; else
    case "${{COMP_WORDS[1]}} $before" in
{values}
    *) case "${{COMP_WORDS[1]}}" in
{flags}
      esac;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _ftp_lightning ftp-lightning
"""


def completion_script(shell: str, stages: Iterable[str], settings_of: Callable[[str], type[Settings]]) -> str:
    """The script for `shell`: after `ftp-lightning` the stages, after a stage its flags, after a flag its choices.

    UserError for a shell that is not in `SHELLS`. `settings_of` gives the settings class of a stage.
    """
    if shell not in SHELLS:
        raise UserError(f"there is no completion for {shell!r}\nGive --print_completion {' or '.join(SHELLS)}.")
    flags, values, names = [], [], list(stages)
    for stage in names:
        settings_class = settings_of(stage)
        listed = [f"--{name}" for name in flags_of(settings_class)]
        more = ["--config", "--print_config", "--help", "--help_all"]
        flags.append(f'      {stage}) words="{" ".join([*listed, *more])}";;')
        for flag, kind in get_type_hints(settings_class).items():
            if words := choices_of(kind):
                values.append(f'    "{stage} --{flag}") words="{" ".join(words)}";;')
    zsh = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return _SCRIPT.format(zsh=zsh, stages=" ".join(names), values="\n".join(values), flags="\n".join(flags))
