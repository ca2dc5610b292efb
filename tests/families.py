"""A tiny random model of every family that docs/models.md calls tested."""

import copy

import torch
import transformers as T
from transformers import AutoModelForCausalLM

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.25,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}
MHA = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS = {
    "llama": lambda **k: T.LlamaConfig(**SHAPE | k),
    "llama_tied_biased": lambda **k: T.LlamaConfig(
        **SHAPE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True} | k
    ),
    "qwen2": lambda **k: T.Qwen2Config(**SHAPE | k),
    "qwen2_sliding": lambda **k: T.Qwen2Config(
        **SHAPE | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2} | k
    ),
    "qwen3": lambda **k: T.Qwen3Config(**SHAPE | {"head_dim": 16} | k),
    "mistral": lambda **k: T.MistralConfig(**SHAPE | {"sliding_window": None} | k),
    "mistral_sliding": lambda **k: T.MistralConfig(**SHAPE | {"sliding_window": 6} | k),
    "gemma2": lambda **k: T.Gemma2Config(**SHAPE | GEMMA | {"sliding_window": 6, "attn_logit_softcapping": 5.0} | k),
    "gemma3": lambda **k: T.Gemma3TextConfig(
        **SHAPE | GEMMA | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2} | k
    ),
    "phi3": lambda **k: T.Phi3Config(**SHAPE | k),
    "gpt_neox": lambda **k: T.GPTNeoXConfig(**MHA | k),
    "gpt_neox_serial": lambda **k: T.GPTNeoXConfig(**MHA | {"use_parallel_residual": False} | k),
    "olmo2": lambda **k: T.Olmo2Config(**SHAPE | k),
    "gpt2": lambda **k: T.GPT2Config(
        **TOKENS | {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256, "initializer_range": 0.25} | k
    ),
    "opt": lambda **k: T.OPTConfig(
        **TOKENS
        | {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "init_std": 0.25}
        | {"max_position_embeddings": 256, "word_embed_proj_dim": 32}
        | k
    ),
    "mixtral": lambda **k: T.MixtralConfig(**SHAPE | EXPERTS | {"num_local_experts": 4} | k),
    "qwen3_moe": lambda **k: T.Qwen3MoeConfig(
        **SHAPE | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8} | k
    ),
}

MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
DEEPSEEK = MLA | {"v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = DEEPSEEK | {"first_k_dense_replace": 1, "n_shared_experts": 1, "topk_group": 1}
BOTH_KINDS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
GRANITE = {"residual_multiplier": 0.5, "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "logits_scaling": 2.0}

# Held to the oracle in test_refusals alone.
MORE = {
    "cohere": lambda **k: T.CohereConfig(**SHAPE | {"use_qk_norm": True} | k),
    "cohere2": lambda **k: T.Cohere2Config(**SHAPE | BOTH_KINDS | k),
    "deepseek_v2": lambda **k: T.DeepseekV2Config(**SHAPE | LATENT | {"topk_method": "greedy", "n_group": 1} | k),
    "deepseek_v3": lambda **k: T.DeepseekV3Config(**SHAPE | LATENT | {"n_group": 2} | k),
    "ernie4_5": lambda **k: T.Ernie4_5Config(**SHAPE | k),
    "exaone4": lambda **k: T.Exaone4Config(**SHAPE | {"sliding_window": 6, "sliding_window_pattern": 2} | k),
    "exaone_moe": lambda **k: T.ExaoneMoeConfig(
        **SHAPE
        | BOTH_KINDS
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
        | k
    ),
    "gemma": lambda **k: T.GemmaConfig(**SHAPE | {"head_dim": 8} | k),
    "gemma4": lambda **k: T.Gemma4TextConfig(
        **SHAPE
        | {"head_dim": 8, "global_head_dim": 16, "sliding_window": 6, "num_kv_shared_layers": 0}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 0}
        | k
    ),
    "glm4": lambda **k: T.Glm4Config(**SHAPE | {"head_dim": 8} | k),
    "gpt_bigcode": lambda **k: T.GPTBigCodeConfig(
        **TOKENS | {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256, "initializer_range": 0.25} | k
    ),
    "granite": lambda **k: T.GraniteConfig(**SHAPE | GRANITE | k),
    "granitemoe": lambda **k: T.GraniteMoeConfig(**SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2} | k),
    "nemotron": lambda **k: T.NemotronConfig(**SHAPE | k),
    "olmo": lambda **k: T.OlmoConfig(**SHAPE | {"clip_qkv": 1.0} | k),
    "olmo3": lambda **k: T.Olmo3Config(**SHAPE | BOTH_KINDS | k),
    "olmoe": lambda **k: T.OlmoeConfig(**SHAPE | EXPERTS | {"num_experts": 4} | k),
    "phi": lambda **k: T.PhiConfig(**SHAPE | k),
    "qwen2_moe": lambda **k: T.Qwen2MoeConfig(
        **SHAPE | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32} | k
    ),
    "seed_oss": lambda **k: T.SeedOssConfig(**SHAPE | {"head_dim": 8} | k),
    "smollm3": lambda **k: T.SmolLM3Config(**SHAPE | {"no_rope_layer_interval": 2} | k),
    "stablelm": lambda **k: T.StableLmConfig(**SHAPE | k),
    "stablelm_parallel": lambda **k: T.StableLmConfig(
        **SHAPE | {"use_parallel_residual": True, "qk_layernorm": True} | k
    ),
    "starcoder2": lambda **k: T.Starcoder2Config(**SHAPE | {"sliding_window": 6} | k),
}


_MADE = {}


def family(name, dtype=torch.float64, attention=None, seed=0, **changes):
    """The model, in eval mode; `attention` its implementation, by default the one transformers would take.

    Every call gives a model of its own, and leaves torch's generator as making it does: copying takes half the time.
    """
    key = repr((name, dtype, attention, seed, sorted(changes.items())))
    if key not in _MADE:
        torch.manual_seed(seed)
        config = (CONFIGS | MORE)[name](**changes)
        model = AutoModelForCausalLM.from_config(config, **({"attn_implementation": attention} if attention else {}))
        _MADE[key] = model.to(dtype).eval().requires_grad_(False), torch.get_rng_state()
    model, state = _MADE[key]
    torch.set_rng_state(state)
    return copy.deepcopy(model)
