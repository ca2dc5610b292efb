"""A tiny random Llama for tests of evaluation."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def random_llama(vocab_size: int, **changes) -> LlamaForCausalLM:
    """Three blocks of width 32, seeded; `changes` go to its config."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **shape | changes)).eval()
