"""What `custom_generate/generate.py` of an exported folder calls: stock `generate` under the folder's pruner."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ftp_lightning.disk.pruned_folder import SETTINGS
from ftp_lightning.errors import UserError
from ftp_lightning.hub import fetched
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.schedule_family import ScheduleFamily

_known: WeakKeyDictionary[Any, dict[Any, TokenPruner]] = WeakKeyDictionary()
_one_at_a_time = threading.RLock()
"""A pruner is attached to the model while it generates, and two of them cannot be."""


def generate_pruned(folder: str, model: Any, *args: Any, ftp_budget: float | None = None, **kwargs: Any) -> Any:
    """`model.generate(*args, **kwargs)`, its prompt pruned.

    Args:
        folder: the export that the caller belongs to; the one that the model was loaded from goes before it.
        ftp_budget: mean sparsity; 0 is dense, None what the generation config says by an attribute of this name, else
            the pruner's own.

    Raises:
        UserError: a budget above the pruner's largest, a cache that cannot be pruned, or no pruner where it should be.
    """
    for config in (kwargs.get("generation_config"), model.generation_config):
        ftp_budget = getattr(config, "ftp_budget", None) if ftp_budget is None else ftp_budget
    with _one_at_a_time:
        pruner = None if ftp_budget == 0 else _pruner(folder, model, ftp_budget)
        custom = model.__dict__.pop("generate", None)  # what `from_pretrained` put there, which calls this function
        try:
            if pruner is None:
                return model.generate(*args, **kwargs)
            with pruner(model):
                return model.generate(*args, **kwargs)
        finally:
            if custom is not None:
                model.__dict__["generate"] = custom


def _pruner(folder: str, model: Any, budget: float | None) -> TokenPruner:
    """The pruner of a budget; of each model the identity is checked once."""
    made = _known.setdefault(model, {})
    if budget not in made:
        if budget is None:
            own = TokenPruner.load(_home(folder, model))
            with own(model):  # checks that it is the model's
                own._base = None
            made[budget] = own
        else:
            own = _pruner(folder, model, None)
            family = own.family or ScheduleFamily([own.scheduled])
            made[budget] = own.changed(schedule=family.at(float(budget)))
    return made[budget]


def _home(folder: str, model: Any) -> Path:
    """The exported folder: where the model was loaded from, else where it was written to."""
    loaded_from = str(getattr(model.config, "_name_or_path", "") or "")
    for place in (loaded_from, folder):
        path = fetched(place) if place else None
        if path is not None and (path / SETTINGS).is_file():
            return path
    raise UserError(f"there is no pruner in {loaded_from or folder}\nLoad the model from the exported folder.")
