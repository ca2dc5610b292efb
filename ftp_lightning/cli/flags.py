"""The flags of a stage as a person reads them: in groups, the most used ones first."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ftp_lightning.cli.settings import Settings

GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(names.split())
    for group, names in {
        "Model": "model pruned dtype device device_map revision",
        "Data": """prompt prompt_file prompts data split rows prompt_tokens continuation_tokens windows tasks items
            limit task_data num_fewshot apply_chat_template recall_share own_answers train_data test_data test_split
            test_windows sensitivity_windows search_windows calibration calibration_windows calibration_recall_share
            validation_windows skip_windows lengths batches modes mixed decode_tokens max_new_tokens""",
        "Method": "",
        "Run": """estimate processes jobs seed seeds batch_size pairs max_seconds shard host port workers timeout
            api_key_file max_batch max_waiting max_body max_prompt_tokens""",
        "Output": "output overwrite tracking answers label quoted shared_folder log_prompts",
    }.items()
}
"""Group -> its flags, in the order of the help. What stands nowhere belongs to "Method"."""

IMPORTANT = """prompt prompt_file prompts keep minutes study run model pruned schedule data budget kv rows router
    host port tasks compare task sensitivity lengths steps generations max_new_tokens apply_chat_template
    prompt_tokens levels learning_rate items seeds jobs processes device output estimate seed""".split()
"""Flags by importance: `--help` shows the first ten that a stage has."""

ALWAYS = ("output",)
SHOWN = 10
FEW = 14
"""Stages with at most so many flags show all of them at once."""


@dataclass(frozen=True)
class Flag:
    """One flag of a stage: its name, what stands behind it, what it does, its default as text ("" for none)."""

    name: str
    value: str
    help: str
    default: str

    @property
    def usage(self) -> str:
        return f"--{self.name} {self.value}".rstrip()


def flags_of(settings_class: type[Settings]) -> dict[str, Flag]:
    """All flags of a stage by name, in the order of its fields, without words and flags that it refuses."""
    hints = get_type_hints(settings_class)
    hidden = settings_class.hidden_flags
    listed = [item for item in fields(settings_class) if not item.metadata["positional"] and item.name not in hidden]
    return {item.name: _flag(item, hints[item.name], settings_class.stage) for item in listed}


def grouped(names: list[str]) -> dict[str, list[str]]:
    """Group -> those of `names` that belong to it, in the group's order; empty groups are left out."""
    of = {name: group for group, known in GROUPS.items() for name in known}
    found: dict[str, list[str]] = {group: [name for name in known if name in names] for group, known in GROUPS.items()}
    found["Method"] = [name for name in names if name not in of]
    return {group: members for group, members in found.items() if members}


def important(settings_class: type[Settings]) -> list[str]:
    """The flags that `--help` shows: those that the stage names in `first_flags`, then by `IMPORTANT`."""
    names = list(flags_of(settings_class))
    if len(names) <= FEW:
        return names
    order = dict.fromkeys((*settings_class.first_flags, *ALWAYS, *IMPORTANT, *reversed(names)))  # its own stand last
    return [name for name in order if name in names][:SHOWN]


def value_name(kind: Any) -> str:
    """What stands behind a flag of this type: NUMBER, TEXT, A,B, or the words to choose from."""
    options = [option for option in get_args(kind) if option is not type(None)]
    if get_origin(kind) is Literal:
        return "|".join(map(str, options))
    if get_origin(kind) is tuple:
        return "A,B"
    if get_origin(kind) is not None and len(options) == 1:  # a type or None
        return value_name(options[0])
    return {bool: "", int: "N", float: "NUMBER"}.get(kind, "TEXT")


def choices_of(kind: Any) -> list[str]:
    """The words that a flag of this type may be; empty where it takes others than a closed list."""
    inside = [kind, *get_args(kind)]
    return [str(word) for part in inside if get_origin(part) is Literal for word in get_args(part)]


def _flag(item: Field, kind: Any, stage: str) -> Flag:
    default = item.default
    text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    if default is None or default is False or default == ():
        text = ""
    value = "PATH" if item.metadata["is_file"] else value_name(kind)
    told = item.metadata["help"].replace("runs/STAGE", f"runs/{stage}")
    return Flag(item.name, value, told, "on" if default is True else text)
