"""A model that does not fit one device, spread over several of one machine (accelerate's `device_map`), block by block.

What runs where is accelerate's: hooks bring what a module is called with to the module's device, and weights that wait
on the CPU or on disk as well. Only one device works at a time; what is won is memory.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftp_lightning.errors import UserError
from ftp_lightning.json_file import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NONE, AUTO = "none", "auto"
LARGEST = 1 << 20


def read_device_map(text: str) -> str | dict[str, str | int] | None:
    """`none`, `auto` (accelerate's balanced map over the devices that are free), or what a JSON file says: module name
    -> device, "cpu" or "disk". UserError for something else."""
    if text in (NONE, AUTO):
        return None if text == NONE else AUTO
    try:
        said = read_json(Path(text).expanduser(), LARGEST)
    except (OSError, ValueError):
        raise UserError(f"device_map is {text!r}; it is not a JSON file\nGive none, auto, or such a file.") from None
    if not isinstance(said, dict) or not said or not all(map(_is_place, said.values())):
        raise UserError(f'{text} is no device map\nIt looks like {{"model.embed_tokens": 0, "model.layers": 1, ...}}.')
    return said


def _is_place(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def spread(model: PreTrainedModel, device_map: str | dict[str, str | int]) -> PreTrainedModel:
    """A model of random weights, made on the CPU, spread as a stored one is by `from_pretrained`. UserError where it
    would have to wait on disk."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = model._no_split_modules
    if device_map == AUTO:
        memory = get_balanced_memory(model, no_split_module_classes=whole)
        device_map = dict(infer_auto_device_map(model, memory, no_split_module_classes=whole))
    try:
        return dispatch_model(model, device_map, skip_keys=model._skip_keys_device_placement)
    except ValueError as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"this model of random weights cannot be spread so: {reason}\nUse another --model.") from None


def check_tied(model: PreTrainedModel, said: dict[str, str | int]) -> None:
    """UserError where embedding and head are one weight, and a file puts them in two places: one would be missing."""
    names = {module: name for name, module in model.named_modules()}
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if None in ends or not model.config.get_text_config().tie_word_embeddings:
        return
    first, last = (_said_of(names[end], said) for end in ends)
    if None not in (first, last) and first != last:
        raise UserError(
            f"embedding ({first}) and head ({last}) are one weight\nLet the device map put both in one place."
        )


def _said_of(name: str, said: dict[str, Any]) -> Any:
    """What a map says of a module: what it says of the module itself, else of the nearest that holds it."""
    inside = [key for key in said if key == "" or name == key or name.startswith(f"{key}.")]
    return said[max(inside, key=len)] if inside else None


def quiet_hooks() -> None:
    """accelerate warns of what was asked for: that weights wait elsewhere."""
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
