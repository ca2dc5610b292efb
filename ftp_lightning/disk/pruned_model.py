"""A base model with its pruner, from the folder of the pruner alone."""

from __future__ import annotations

from ftp_lightning.disk.pruned_folder import read_settings
from ftp_lightning.errors import UserError
from ftp_lightning.models import load
from ftp_lightning.pruning.pruner import TokenPruner


def load_pruned(folder, *, dtype: str = "float32", device: str = "cpu"):
    """(model, tokenizer): the base model that the folder names, with the pruner attached.

    Raises:
        UserError: the folder names no base, or the base is not the model the pruner was made for.
    """
    base = read_settings(folder).get("base")
    if not base:
        raise UserError(
            f"{folder} names no base model.\nLoad one yourself and use TokenPruner.load(folder).attach(model)."
        )
    pruner = TokenPruner.load(folder)
    model, tokenizer = load(base, dtype=dtype, device=device)
    pruner.attach(model)
    return model, tokenizer
