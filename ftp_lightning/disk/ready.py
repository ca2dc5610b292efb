"""Ready-made pruners: folders that come with the package, by the name of their model, each with a card of its numbers.

A folder holds what `TokenPruner.save` writes, and card.json: which weights it was made from, how, and what it keeps.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftp_lightning.errors import UserError
from ftp_lightning.json_file import read_json

if TYPE_CHECKING:
    from ftp_lightning.pruning.pruner import TokenPruner

READY = Path(__file__).resolve().parent.parent / "assets" / "ready"
CARD = "card.json"
_LARGEST_CARD = 1_000_000


def ready_names() -> list[str]:
    """Names of all ready-made pruners."""
    return sorted(path.parent.name for path in READY.glob(f"*/{CARD}"))


def is_ready(name: str | Path) -> bool:
    """Whether this names a ready-made pruner, and not a pruner in a folder of that name."""
    return str(name) in ready_names() and not (Path(name) / "pruner.json").exists()


def pruner_folder(name: str | Path) -> Path:
    """The folder of a pruner: where the ready-made one of this name lies, else the path itself."""
    return READY / str(name) if is_ready(name) else Path(name).expanduser()


def ready_card(name: str) -> dict[str, Any]:
    """What is known of a ready-made pruner: `made_from` (which weights), `command`, and its `curve`.

    UserError for a name that has none.
    """
    check_ready(name)
    return read_json(READY / name / CARD, _LARGEST_CARD)


def check_ready(name: str) -> None:
    """UserError where no ready-made pruner has this name."""
    if name not in ready_names():
        raise UserError(
            f"there is no ready-made pruner for {name}; there are {', '.join(ready_names())}\n"
            f"Make one by `ftp-lightning tune --model {name} --prompts FILE`."
        )


def load_pruner(name: str | Path) -> TokenPruner:
    """The ready-made pruner of this name, or the one in a folder.

    A ready-made pruner goes by its model's name: the original weights and their quantised packages differ, and it takes
    either. So its shape is checked where it is attached, not its weights; `other_weights` tells which it was made from.
    """
    from ftp_lightning.pruning.pruner import TokenPruner

    pruner = TokenPruner.load(pruner_folder(name))
    if is_ready(name) and pruner._base is not None:
        pruner._base = {"base": str(name), "base_identity": _shape(pruner._base["base_identity"])}
    return pruner


def _shape(identity: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (identity or {}).items() if not key.startswith("weights")}


def base_of(pruned: str | Path) -> str:
    """The base model that a pruner names. UserError where it names none."""
    from ftp_lightning.disk.pruned_folder import read_settings

    base = read_settings(pruner_folder(pruned)).get("base")
    if not base:
        raise UserError(f"{pruned} names no base model\nGive it by --model.")
    return str(base)


def other_weights(name: str) -> str | None:
    """A sentence where the model that `name` loads here has other weights than its ready-made pruner was made from."""
    from ftp_lightning.models import title

    made_from, here = ready_card(name)["made_from"], title(name)
    if made_from == here:
        return None
    return f"the ready-made pruner {name} was made from {made_from}; here it prunes {here}: its numbers may differ"
