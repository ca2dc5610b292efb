"""What a model folder says of itself, looked at before a library believes it: sizes, names of files, kernels."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from ftp_lightning.errors import UserError
from ftp_lightning.json_file import parse_json
from ftp_lightning.named_file import read_named

MOST = {
    "num_hidden_layers": 1000, "num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 65_536,
    "hidden_size": 65_536, "intermediate_size": 10**7, "vocab_size": 10**7, "max_position_embeddings": 10**9,
    "num_labels": 100_000, "num_experts": 100_000, "num_local_experts": 100_000, "n_layer": 1000, "n_embd": 65_536,
    "n_head": 4096, "n_positions": 10**9,
}  # fmt: skip
"""Sizes in a config.json, from 1 [ours]: the largest models have a tenth of them."""
KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
"""Attention implementations that are part of transformers; any other name would be downloaded and run."""
_READ = (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt")
"""Endings of what transformers reads of a folder."""
_PLAIN = ("F64", "F32", "F16", "BF16")
_LARGEST_CONFIG, _LARGEST_INDEX, _LARGEST_HEADER = 4 * 2**20, 256 * 2**20, 100_000_000


def check_folder(folder: Path, name: str, weights: bool) -> None:
    """UserError where config.json is no configuration, asks for absurd sizes or foreign code, or for more than the
    weights hold; nothing is allocated. UserError, too, for a pipe or device, which would be waited for or passed over.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ and not path.is_file():
            raise UserError(
                f"{path.name} of {name} is not a file, or is a broken link\nGive the complete files of one model."
            )
    config = _object(folder / "config.json", _LARGEST_CONFIG)
    parts = [config, *(part for key in ("text_config", "llm_config") if isinstance(part := config.get(key), dict))]
    for part in parts:
        _check_sizes(part, name)
        for key in ("attn_implementation", "_attn_implementation"):
            if part.get(key) not in (None, *KERNELS) and not isinstance(part.get(key), dict):
                raise UserError(f"config.json of {name} asks for the attention {str(part[key])[:60]!r}\nRemove {key}.")
        for key in ("dtype", "torch_dtype"):
            if not isinstance(part.get(key), str | None):
                raise UserError(
                    f"config.json of {name} says {key} {str(part[key])[:40]}, must be a name\nRemove {key}."
                )
    if weights:
        _check_index(folder, name)
        _check_against_weights(folder, parts[-1], name)
        if config.get("quantization_config") is not None:
            _check_quantised(folder, config["quantization_config"], name)


def _object(path: Path, most: int) -> dict[str, Any]:
    content = read_named(path, most)
    try:
        found = parse_json(content)
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON: {str(error)[:120]}\nGive the complete files of one model."
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold an object, not {type(found).__name__}\nGive the files of one model.")
    return found


def _check_sizes(config: dict[str, Any], name: str) -> None:
    for key, most in MOST.items():
        value = config.get(key, 1)
        if value is None or isinstance(value, list):  # some families leave one out, or say it per block
            continue
        if type(value) is not int or not 1 <= value <= most:
            raise UserError(
                f"config.json of {name} says {key} {str(value)[:40]}, must be a whole number from 1 to {most}\n"
                "Give the files of one model as they were saved."
            )


def _check_index(folder: Path, name: str) -> None:
    """UserError where an index of weights names files elsewhere."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return
    listed = _object(path, _LARGEST_INDEX).get("weight_map")
    named: list[Any] = list(listed.values()) if isinstance(listed, dict) else [None]
    files = set(named) if all(isinstance(file, str) for file in named) else {""}
    for file in files:
        if not file or Path(file).name != file or not (folder / file).is_file():
            raise UserError(
                f"{path.name} of {name} names {file[:60]!r}, which is not a file of that folder\n"
                "Give the complete files of one model."
            )


def _check_against_weights(folder: Path, config: dict[str, Any], name: str) -> None:
    """UserError where the sizes ask for more numbers than the files have bits, or for more blocks than tensors."""
    files = sorted(folder.glob("*.safetensors"))
    stored = sum(file.stat().st_size for file in (*files, *folder.glob("pytorch_model*.bin")))
    width, layers = config.get("hidden_size"), config.get("num_hidden_layers")
    if type(width) is int:
        for key in ("vocab_size", "intermediate_size"):
            if type(value := config.get(key)) is int and value * width > 8 * stored:
                raise UserError(
                    f"config.json of {name} says {key} {value} and hidden_size {width}, its weights have {stored:,} "
                    "bytes\nGive the complete files of one model."
                )
    if files and type(layers) is int and layers > (tensors := sum(map(_tensors, files))):
        raise UserError(
            f"config.json of {name} says {layers} blocks, its weights have {tensors} tensors\n"
            "Give the complete files of one model."
        )


def _check_quantised(folder: Path, quantised: Any, name: str) -> None:
    """UserError where config.json names a quantisation and all tensors are plain: the libraries would pass over it."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = {key: about for file in files for key, about in _header(file).items() if key != "__metadata__"}
    plain = all(isinstance(about, dict) and about.get("dtype") in _PLAIN for about in tensors.values())
    if tensors and plain and not any("scale" in key for key in tensors):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"config.json of {name} says that its weights are quantised ({str(method)[:40]}); they are plain numbers\n"
            "Remove quantization_config, or give the quantised files."
        )


def _tensors(file: Path) -> int:
    """How many tensors a file of safetensors says it holds; UserError where it is none."""
    return len(_header(file))


def _header(file: Path) -> dict[str, Any]:
    """What a file of safetensors says of its tensors, by name; UserError where it is none."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_LARGEST_HEADER, file.stat().st_size):
                raise ValueError("its header is longer than the file")
            found = json.loads(stream.read(length))
            if not isinstance(found, dict):
                raise ValueError("its header is not an object")
            return found
    except (OSError, ValueError, struct.error, RecursionError, TypeError) as error:
        raise UserError(f"{file} is not a file of weights: {str(error)[:120]}\nCopy it again.") from None
