"""A base model with its pruner, from the folder of the pruner alone or by the name of a ready-made one."""

from __future__ import annotations

import sys

from ftp_lightning.disk.pruned_folder import read_settings
from ftp_lightning.disk.ready import check_ready, is_ready, load_pruner, other_weights, pruner_folder
from ftp_lightning.errors import UserError
from ftp_lightning.models import load
from ftp_lightning.models.named import NAMED


def load_pruned(folder, *, dtype: str = "float32", device: str = "cpu"):
    """(model, tokenizer): a base model with its pruner attached, which is `model.pruner`.

    Args:
        folder: of a pruner that names its base, or the name of a ready-made one: "smollm2-135m-instruct", "embedded"
            and whatever else docs/models.md lists. Its base is loaded by that name: the original where the Hub's cache
            has it, else the quantised weights of its package. Where they are not those that the pruner was made from,
            a line on stderr says so.

    Raises:
        UserError: the folder names no base, the base is not the model the pruner was made for, the name has no
            ready-made pruner, or its model is not installed.

    Example:
        >>> model, tokenizer = load_pruned("embedded")
        >>> model.pruner.schedule.num_blocks
        12
    """
    if str(folder) in NAMED and not is_ready(folder) and not (pruner_folder(folder) / "pruner.json").exists():
        check_ready(str(folder))
    base = read_settings(pruner_folder(folder)).get("base")
    if not base:
        raise UserError(
            f"{folder} names no base model.\nLoad one yourself and use TokenPruner.load(folder).attach(model)."
        )
    pruner = load_pruner(folder)
    model, tokenizer = load(base, dtype=dtype, device=device)
    if is_ready(folder) and (told := other_weights(str(folder))):
        print(told, file=sys.stderr)
    pruner.attach(model)
    return model, tokenizer
