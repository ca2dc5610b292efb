"""A model is pruned exactly, or refused with a sentence that says what was looked for or is not understood."""

import pytest
import torch
import transformers as T
from families import CONFIGS, DEEPSEEK, MORE, SHAPE, TOKENS, family
from test_families import DTYPES, SCHEDULE, check

from ftp_lightning import DynamicRouter, RandomRouter, StaticRouter, TokenPruner, UserError

# transformers multiplies by experts in float32 and below
EXPERTS = {"deepseek_v2", "deepseek_v3", "exaone_moe", "granitemoe", "olmoe", "qwen2_moe"}
MHA = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
GPT = TOKENS | {"n_embd": 32, "n_layer": 4, "n_head": 4}
BART = {name: 4 for name in ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")}
WINDOW = {"head_dim": 8, "sliding_window": 6}
LINEAR = {f"linear_{name}": 4 for name in ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")}
HYBRID = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}
BLOCKS = "no nn.ModuleList of 4 decoder blocks that take `hidden_states` and a key-value cache"


@pytest.mark.parametrize("name", MORE)
def test_more_families_equal_the_masked_oracle(name):
    """All parameters random, the one-dimensional ones too: a bias, a norm or a scale that is left out would show."""
    dtype = torch.float32 if name in EXPERTS else torch.float64
    model = family(name, dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.2 * torch.randn_like(parameter)
    torch.manual_seed(3)
    for kv in ("evict", "keep"):
        check(model, TokenPruner(DynamicRouter(), SCHEDULE, kv=kv), [18, 12], 4, "left", [1, 3], DTYPES[dtype])
    apart = TokenPruner(RandomRouter(1), SCHEDULE, kv=["keep", "evict"] * 2, parts="attention+mlp")
    check(model, apart, [18, 11], 3, "left", [3], DTYPES[dtype])


def bidirectional():
    return T.Gemma3ForCausalLM(CONFIGS["gemma3"](use_bidirectional_attention=True))


REFUSED = {
    # adds something to the scores, or hides keys by more than slots and a window
    "falcon": (lambda: T.FalconForCausalLM(T.FalconConfig(**MHA)), "adds alibi to the attention scores"),
    "bloom": (lambda: T.BloomForCausalLM(T.BloomConfig(**TOKENS, hidden_size=32, n_layer=4, n_head=4)), BLOCKS),
    "mpt": (lambda: T.MptForCausalLM(T.MptConfig(**TOKENS, d_model=32, n_heads=4, n_layers=4)), BLOCKS),
    "llama4": (
        lambda: T.Llama4ForCausalLM(T.Llama4TextConfig(**SHAPE, head_dim=8, num_local_experts=2)),
        "'chunked_attention', understood are full_attention, sliding_attention",
    ),
    "llama4_full": (
        lambda: T.Llama4ForCausalLM(
            T.Llama4TextConfig(**SHAPE, head_dim=8, num_local_experts=2, layer_types=["full_attention"] * 4)
        ),
        "counts positions by itself",
    ),
    "deepseek_v32": (
        lambda: T.AutoModelForCausalLM.from_config(
            T.AutoConfig.for_model("deepseek_v32", **SHAPE | DEEPSEEK, n_group=1, topk_group=1, index_topk=4)
        ),
        "'indexed_attention'",
    ),
    "gpt_oss": (
        lambda: T.GptOssForCausalLM(T.GptOssConfig(**SHAPE | WINDOW, num_local_experts=4)),
        "attention has learned sinks",
    ),
    "doge": (lambda: T.DogeForCausalLM(T.DogeConfig(**SHAPE)), r"mask of its own \(attn_mask\)"),
    "gemma3_bidirectional": (bidirectional, "its attention is not causal"),
    # takes something that goes by token
    "gemma3n": (
        lambda: T.Gemma3nForCausalLM(
            T.Gemma3nTextConfig(
                **SHAPE | WINDOW | PER_LAYER,
                num_kv_shared_layers=2,
                laurel_rank=4,
                activation_sparsity_pattern=None,
                layer_types=["sliding_attention", "full_attention"] * 2,
            )  # fmt: skip
        ),
        "it takes per_layer_input, which may go by token",
    ),
    "gemma4_per_layer": (lambda: T.Gemma4ForCausalLM(MORE["gemma4"](**PER_LAYER)), "takes per_layer_input"),
    "gemma4_shared": (
        lambda: T.Gemma4ForCausalLM(MORE["gemma4"](num_kv_shared_layers=2)),
        "block 2: it reads the keys and values of another block",
    ),
    "falcon_h1": (lambda: T.FalconH1ForCausalLM(T.FalconH1Config(**SHAPE | MAMBA, mamba_d_ssm=64)), "mamba_attention"),
    # has blocks without attention
    "mamba": (lambda: T.MambaForCausalLM(T.MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=4)), BLOCKS),
    "qwen3_next": (lambda: T.Qwen3NextForCausalLM(T.Qwen3NextConfig(**SHAPE | HYBRID | LINEAR)), BLOCKS),
    "lfm2": (
        lambda: T.Lfm2ForCausalLM(T.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"] * 2)),
        "its Lfm2ShortConv does not go through transformers' attention interface",
    ),
    # attends by code of its own
    "gptj": (lambda: T.GPTJForCausalLM(T.GPTJConfig(**GPT, rotary_dim=4)), "GPTJAttention does not go through"),
    "codegen": (lambda: T.CodeGenForCausalLM(T.CodeGenConfig(**GPT, rotary_dim=4)), BLOCKS),
    # is no decoder alone
    "t5": (
        lambda: T.T5ForConditionalGeneration(T.T5Config(vocab_size=64, d_model=32, d_ff=64, num_layers=4, num_heads=4)),
        "cross-attention",
    ),
    "bart": (
        lambda: T.BartForConditionalGeneration(T.BartConfig(vocab_size=64, d_model=32, **BART)),
        "read a second text through cross-attention",
    ),
    "gpt2_cross_attention": (lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT, add_cross_attention=True)), "second text"),
    "mllama": (
        lambda: T.MllamaForCausalLM(T.AutoConfig.for_model("mllama_text_model", **SHAPE, cross_attention_layers=[1])),
        "it takes cross_attention_mask, cross_attention_states",
    ),
    "bert": (lambda: T.BertForMaskedLM(T.BertConfig(**MHA)), "BertEncoder, which runs its blocks, takes no"),
    "bert_decoder": (lambda: T.BertLMHeadModel(T.BertConfig(**MHA, is_decoder=True)), "takes no `inputs_embeds`"),
    "a linear map": (lambda: torch.nn.Linear(3, 3), "no config that tells how many decoder blocks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_sentence(name):
    make, sentence = REFUSED[name]
    model = make()
    with pytest.raises(UserError, match=f"cannot be pruned.*{sentence}") as refusal:
        TokenPruner(StaticRouter(), SCHEDULE).attach(model)
    assert type(model).__name__ in str(refusal.value) and str(refusal.value).count("\n") < 3
    assert not any("forward" in module.__dict__ or hasattr(module, "_ftp_tap") for module in model.modules())


def test_images_that_see_each_other_are_refused_when_they_come():
    """Gemma 3 with a vision tower hands its decoder a mask; what is in it is not read."""
    vision = T.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    config = T.Gemma3Config(
        text_config=CONFIGS["gemma3"](), vision_config=vision, image_token_index=63, mm_tokens_per_image=4
    )
    model = T.Gemma3ForConditionalGeneration(config).eval()
    with TokenPruner(StaticRouter(), SCHEDULE)(model), torch.no_grad():
        with pytest.raises(UserError, match="other masks are not supported"):
            model(torch.ones(1, 6, dtype=torch.long))
