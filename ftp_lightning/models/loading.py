"""Load models, tokenizers and configurations by name; what is wrong with a name or a file is a sentence."""

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftp_lightning.device_map import NONE, check_tied, quiet_hooks, read_device_map, spread
from ftp_lightning.errors import UserError, hub_errors
from ftp_lightning.models.folder_checks import check_folder
from ftp_lightning.models.named import NAMED, is_named, locate
from ftp_lightning.models.pretrained import COMPLETE, cause, check_complete, quiet
from ftp_lightning.models.random_weights import random_config, random_model
from ftp_lightning.named_file import named_path

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "llama"
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "model.safetensors.index.json")


def load_model(
    name: str = "embedded",
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    seed: int = 0,
    device_map: str = NONE,
) -> "PreTrainedModel":
    """The causal language model `name`, frozen and in eval mode.

    `dtype` is one of DTYPES, `device` a torch device or "auto", `revision` a Hub branch, tag or commit, `seed` draws
    the weights of `random:SHAPE` (built directly in this dtype on this device). With a `device_map` ("auto" or a file,
    see `device_map.read_device_map`) the blocks are spread over several devices and `device` has no say; random weights
    are then built on the CPU. Code from the Hub is never executed.
    Raises UserError for everything that can be wrong with these values, with its remedy.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}\nChoose one of: {', '.join(DTYPES)}")
    where = read_device_map(device_map)
    place = torch.device("cpu") if where is not None else resolve_device(device)
    if name.startswith("random:"):
        model = random_model(name.removeprefix("random:"), DTYPES[dtype], place, seed)
        model = model if where is None else _spread(model, where)
    else:
        model = _read_model(name, revision, DTYPES[dtype], where)
        model = model.to(place) if where is None else model
    return model.eval().requires_grad_(False)


def _spread(model: "PreTrainedModel", where: str | dict) -> "PreTrainedModel":
    quiet_hooks()
    return spread(model, where)


def _read_model(name: str, revision: str | None, dtype: torch.dtype, where: str | dict | None) -> "PreTrainedModel":
    """The stored model `name`, complete, on the CPU or spread over devices."""
    source = _checked(name, revision, weights=True)
    options = {} if where is None else {"device_map": where}
    if where is not None:
        quiet_hooks()
    model, info = _pretrained("AutoModelForCausalLM", source, name, revision, dtype=dtype, **COMPLETE, **options)
    check_complete(info, name)
    if isinstance(where, dict):
        check_tied(model, where)
    return model


def load_tokenizer(name: str = "embedded", *, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of model `name`; random shapes take the embedded model's. Raises UserError as `load_model`."""
    if name.startswith("random:"):
        random_config(name.removeprefix("random:"))
        name = "embedded"
    return _pretrained("AutoTokenizer", _checked(name, revision, weights=False), name, revision)


def load_config(name: str = "embedded", *, revision: str | None = None) -> "PretrainedConfig":
    """The configuration of model `name`, whose weights must be there but are not read. UserError as `load_model`."""
    if name.startswith("random:"):
        return random_config(name.removeprefix("random:"))
    return _pretrained("AutoConfig", _checked(name, revision, weights=True), name, revision)


def load(
    name: str = "embedded",
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    seed: int = 0,
    device_map: str = NONE,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Model and tokenizer of `name`, as `load_model` and `load_tokenizer` give them."""
    about = {"dtype": dtype, "device": device, "device_map": device_map}
    model = load_model(name, **about, revision=revision, seed=seed)
    return model, load_tokenizer(name, revision=revision)


def resolve_device(name: str) -> torch.device:
    """The torch device of `name`; "auto" is cuda where there is one, otherwise cpu. UserError for others."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}\nChoose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda", "mps") or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"device {name!r} does not exist\nChoose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        found = torch.cuda.device_count()
        raise UserError(f"device {name!r} does not exist: this machine has {found} CUDA devices\nChoose auto or cpu")
    return device


def _checked(name: str, revision: str | None, weights: bool) -> str:
    """Where to load `name` from, after the checks that transformers words badly; a Hub name is returned as it is."""
    path = EMBEDDED if name == "embedded" else named_path(locate(name, revision), "model")
    if not name or not path.is_dir():
        if not name or path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(
                f"model folder {name!r} does not exist\nGive a folder, a Hub name, 'embedded' or 'random:SHAPE'"
            )
        return name
    if not (path / "config.json").is_file():
        raise UserError(f"model folder {name} has no config.json\nGive a folder as `save_pretrained` writes it")
    if weights and not any(file for pattern in WEIGHTS for file in path.glob(pattern)):
        raise UserError(f"model folder {name} has no weights (*.safetensors or pytorch_model*.bin)\nCopy them there")
    check_folder(path, name, weights)
    return str(path)


def _pretrained(loader: str, where: str, name: str, revision: str | None, **options: Any) -> Any:
    """What transformers' `loader` reads; UserError with the cause for all that it raises.

    Files that somebody else wrote make it raise nearly anything: ImportError for a quantisation that is not installed,
    RuntimeError for other shapes, KeyError, errors of pickle and of its own validation.
    """
    import transformers

    local = Path(where).is_dir()
    try:
        with quiet():
            return getattr(transformers, loader).from_pretrained(
                where, revision=None if local else revision, trust_remote_code=False, **options
            )
    except Exception as error:
        if local or not isinstance(error, hub_errors(OSError, ValueError)):
            what = f"model {name}" if is_named(name) or not local else f"model folder {name}"
            raise UserError(f"{what} cannot be loaded\n{cause(error)}") from error
        begun = [known for known in NAMED if len(name) > 3 and known.startswith(name.lower())]
        if near := begun or get_close_matches(name, [*NAMED, "embedded"], 1, 0.8):
            raise UserError(f"there is no model {name!r}\nDid you mean {near[0]}?") from error
        raise UserError(
            f"model {name!r} is not a local folder and cannot be loaded from the Hub: {cause(error)}\n"
            f"Give a local folder, or run `ftp-lightning prefetch --model {name}` where there is a network.\n"
            "Then set HF_HUB_OFFLINE=1 here."
        ) from error
