"""Models and tokenizers by name: `embedded`, a local folder, a Hub name, or `random:SHAPE`."""

import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftp_lightning.device_map import NONE, check_tied, quiet_hooks, read_device_map, spread
from ftp_lightning.errors import UserError, hub_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = Path(__file__).resolve().parent / "assets" / "llama"
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "model.safetensors.index.json")


LLAMA_3_1_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shape(blocks: int, hidden: int, heads: int, kv_heads: int, mlp: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": blocks,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        **more,
    }


# Random weights, for measuring speed and memory: rotary positions reach as far as somebody wants to measure.
SHAPES = {
    "tiny": _shape(3, 64, 4, 2, 128, 4096),
    "llama-110m": _shape(12, 768, 12, 12, 3072, 32000, max_position_embeddings=16384),
    "llama-7b": _shape(32, 4096, 32, 32, 11008, 32000, max_position_embeddings=16384),  # LLaMA2-7B, its 4096 stretched
    "llama-13b": _shape(40, 5120, 40, 40, 13824, 32000),  # LLaMA2-13B
    "llama3-8b": _shape(32, 4096, 32, 8, 14336, 128256, max_position_embeddings=8192),
    "qwen1.5-7b": _shape(32, 4096, 32, 32, 11008, 151936, max_position_embeddings=32768, attention_bias=True),
    "qwen2.5-7b": _shape(28, 3584, 28, 4, 18944, 152064, max_position_embeddings=131072, attention_bias=True),
    "llama-8b": _shape(  # Llama-3.1-8B
        32, 4096, 32, 8, 14336, 128256, max_position_embeddings=131072, rope_parameters=LLAMA_3_1_ROPE
    ),
}


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
        raise UserError(f"unknown dtype {dtype!r}\nchoose one of: {', '.join(DTYPES)}")
    if (where := read_device_map(device_map)) is not None:
        return _spread(name, DTYPES[dtype], where, revision, seed).eval().requires_grad_(False)
    place = resolve_device(device)
    if name.startswith("random:"):
        model = _random_model(name.removeprefix("random:"), DTYPES[dtype], place, seed)
    else:
        model = _pretrained(
            "AutoModelForCausalLM", _checked(name, weights=True), name, revision, dtype=DTYPES[dtype]
        ).to(place)
    return model.eval().requires_grad_(False)


def _spread(name: str, dtype: torch.dtype, where: str | dict, revision: str | None, seed: int) -> "PreTrainedModel":
    quiet_hooks()
    if name.startswith("random:"):
        return spread(_random_model(name.removeprefix("random:"), dtype, torch.device("cpu"), seed), where)
    source = _checked(name, weights=True)
    model = _pretrained("AutoModelForCausalLM", source, name, revision, dtype=dtype, device_map=where)
    if isinstance(where, dict):
        check_tied(model, where)
    return model


def load_tokenizer(name: str = "embedded", *, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of model `name`; random shapes take the embedded model's. Raises UserError as `load_model`."""
    if name.startswith("random:"):
        _random_config(name.removeprefix("random:"))
        name = "embedded"
    return _pretrained("AutoTokenizer", _checked(name, weights=False), name, revision)


def load_config(name: str = "embedded", *, revision: str | None = None) -> "PretrainedConfig":
    """The configuration of model `name`, whose weights must be there but are not read. UserError as `load_model`."""
    if name.startswith("random:"):
        return _random_config(name.removeprefix("random:"))
    return _pretrained("AutoConfig", _checked(name, weights=True), name, revision)


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
        raise UserError(f"unknown device {name!r}\nchoose auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        found = torch.cuda.device_count()
        raise UserError(f"device {name!r} is not there: this machine shows {found} CUDA devices\nchoose auto or cpu")
    return device


def model_identity(model: "PreTrainedModel") -> dict[str, Any]:
    """What a pruner must find again in its base model: its shape, and `weights_sha256` of a sample.

    The sample is every tensor's name, shape, first and last value, rounded to bfloat16: cheap, and the same for one
    checkpoint loaded in float32 or bfloat16 on any device. It tells fine-tuned models apart; it is no protection
    against forgery. A quantised model is another one than its base, and so is one with adapters, whichever is active.
    """
    if (known := model.__dict__.get(_KNOWN)) is not None:
        return dict(known)
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return {
        "model_type": config.model_type,
        "num_blocks": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "vocab_size": config.vocab_size,
        "weights_sha256": _weights_sample(model),
    }


def remember_identity(model: "PreTrainedModel") -> None:
    """Ask now who the model is, once for all: of a model whose weights are to be cut up."""
    model.__dict__[_KNOWN] = model_identity(model)


_KNOWN = "_ftp_identity"


def _weights_sample(model: "PreTrainedModel") -> str:
    tensors = {name: tensor for name, tensor in sorted(_named_weights(model)) if tensor.numel()}
    ends = [t.detach().flatten()[at].to(torch.bfloat16) for t in tensors.values() for at in (0, -1)]
    if len({end.device for end in ends}) > 1:
        ends = [end.cpu() for end in ends]
    ends = torch.stack(ends)
    head = repr([(name, tuple(tensor.shape)) for name, tensor in tensors.items()])
    values = ends.to("cpu", torch.float32).numpy()
    return hashlib.sha256(head.encode() + values.tobytes()).hexdigest()


def _named_weights(model: "PreTrainedModel") -> "Iterator[tuple[str, torch.Tensor]]":
    """Names and weights, as they are stored; what peft wraps a model in adds no prefix to the names."""
    from ftp_lightning.pruning.places import fetched
    from ftp_lightning.pruning.stored import stored_parts

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = {id(weight): name for name, weight in base.named_parameters()}
    for name, weight in model.named_parameters():
        yield from stored_parts(fetched(model, name, weight), own.get(id(weight), name))


def _checked(name: str, weights: bool) -> str:
    """Where to load `name` from, after the checks that transformers words badly; a Hub name is returned as it is."""
    path = EMBEDDED if name == "embedded" else Path(name).expanduser()
    if not name or not path.is_dir():
        if not name or path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(
                f"model folder {name!r} does not exist\ngive a folder, a Hub name, 'embedded' or 'random:SHAPE'"
            )
        return name
    if not (path / "config.json").is_file():
        raise UserError(f"model folder {name} has no config.json\ngive a folder as `save_pretrained` writes it")
    if weights and not any(file for pattern in WEIGHTS for file in path.glob(pattern)):
        raise UserError(f"model folder {name} has no weights (*.safetensors or pytorch_model*.bin)\ncopy them there")
    return str(path)


def _pretrained(loader: str, where: str, name: str, revision: str | None, **options: Any) -> Any:
    import transformers
    from safetensors import SafetensorError

    local = Path(where).is_dir()
    try:
        with _quiet():
            return getattr(transformers, loader).from_pretrained(
                where, revision=None if local else revision, trust_remote_code=False, **options
            )
    except hub_errors(OSError, ValueError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        if local:
            raise UserError(f"model folder {name} cannot be loaded\n{reason}") from error
        raise UserError(
            f"model {name!r} is no local folder and cannot be had from the Hub: {reason}\n"
            "without network give a local folder, or on a machine with network run\n"
            f"`python -m ftp_lightning prefetch --model {name}`, then set HF_HUB_OFFLINE=1 here"
        ) from error


def _random_config(shape: str) -> "LlamaConfig":
    from transformers import LlamaConfig

    if shape not in SHAPES:
        raise UserError(
            f"unknown random shape {shape!r}\nchoose one of: {', '.join(f'random:{name}' for name in SHAPES)}"
        )
    return LlamaConfig(**SHAPES[shape], bos_token_id=0, eos_token_id=1, pad_token_id=2)


def _random_model(shape: str, dtype: torch.dtype, device: torch.device, seed: int) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    config = _random_config(shape)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


@contextmanager
def _quiet() -> "Iterator[None]":
    """Transformers' progress bars off, and as before afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
