"""Models of named shapes with random weights: `random:SHAPE`."""

from typing import TYPE_CHECKING, Any

import torch

from ftp_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel

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


def random_config(shape: str) -> "LlamaConfig":
    """The configuration of a shape; UserError for one that SHAPES does not have."""
    from transformers import LlamaConfig

    if shape not in SHAPES:
        raise UserError(
            f"unknown random shape {shape!r}\nChoose one of: {', '.join(f'random:{name}' for name in SHAPES)}"
        )
    return LlamaConfig(**SHAPES[shape], bos_token_id=0, eos_token_id=1, pad_token_id=2)


def random_model(shape: str, dtype: torch.dtype, device: torch.device, seed: int) -> "PreTrainedModel":
    """A model of this shape whose weights `seed` draws, built in this dtype on this device."""
    from transformers import AutoModelForCausalLM

    config = random_config(shape)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
