"""Every argument of `generate` that transformers documents does with a pruner what it does without.

The oracle is an identity: in a last block whose keys and values are all kept, nobody reads what a prompt's tokens but
the last one become. A pruner that lets them skip there must not change a single token, score or attention.
"""

import inspect
import warnings

import pytest
import torch
from families import family
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, WatermarkingConfig
from transformers.generation.logits_process import LogitsProcessorList, MinLengthLogitsProcessor
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ftp_lightning import Schedule, StaticRouter, TokenPruner
from ftp_lightning.errors import UserError

TEXT = torch.randint(3, 64, (2, 14), generator=torch.Generator().manual_seed(1))
TEXT[:, 7:] = TEXT[:, :7]  # so that looking up the prompt finds guesses
UNSEEN = TokenPruner(StaticRouter(), Schedule([0.0, 0.0, 0.0, 1.0]), kv="keep")
MODEL = family("llama", torch.float64, eos_token_id=2)


def words():
    """A tokenizer of words w3, w4, ..."""
    vocabulary = {f"w{i}": i for i in range(64)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2")


class Silent(BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


def assistant():
    return family("llama", torch.float64, eos_token_id=2)


SAMPLED = {"do_sample": True}
BEAMS = {"num_beams": 2}
NAMED = {"output_scores": True, "return_dict_in_generate": True}
ONE = {"inputs": TEXT[:1]}
HELPED = ONE | {"assistant_model": assistant()}
AGAINST = {"negative_prompt_ids": TEXT[:, :5], "guidance_scale": 1.5}
"""What else an argument wants."""
CASES = {
    "max_length": [{"max_length": 20, "max_new_tokens": None}], "max_new_tokens": [{"max_new_tokens": 3}],
    "min_length": [{"min_length": 18}], "min_new_tokens": [{"min_new_tokens": 3}], "max_time": [{"max_time": 60.0}],
    "early_stopping": [BEAMS | {"early_stopping": True}], "do_sample": [SAMPLED],
    "num_beams": [BEAMS, {"num_beams": 3}],
    "stop_strings": [{"stop_strings": ["w5"], "tokenizer": words()}], "use_cache": [{"use_cache": True}],
    "temperature": [SAMPLED | {"temperature": 0.7}], "top_k": [SAMPLED | {"top_k": 5}],
    "top_p": [SAMPLED | {"top_p": 0.7}], "min_p": [SAMPLED | {"min_p": 0.1}], "top_h": [SAMPLED | {"top_h": 0.4}],
    "typical_p": [SAMPLED | {"typical_p": 0.5}], "epsilon_cutoff": [SAMPLED | {"epsilon_cutoff": 0.01}],
    "eta_cutoff": [SAMPLED | {"eta_cutoff": 0.01}], "repetition_penalty": [{"repetition_penalty": 1.3}],
    "encoder_repetition_penalty": [{"encoder_repetition_penalty": 1.3}],
    "encoder_no_repeat_ngram_size": [{"encoder_no_repeat_ngram_size": 2}],
    "length_penalty": [BEAMS | {"length_penalty": 0.5}], "no_repeat_ngram_size": [{"no_repeat_ngram_size": 2}],
    "bad_words_ids": [{"bad_words_ids": [[5], [6, 7]]}], "renormalize_logits": [SAMPLED | {"renormalize_logits": True}],
    "forced_bos_token_id": [{"forced_bos_token_id": 4}], "forced_eos_token_id": [{"forced_eos_token_id": 2}],
    "remove_invalid_values": [{"remove_invalid_values": True}], "suppress_tokens": [{"suppress_tokens": [5, 9]}],
    "exponential_decay_length_penalty": [{"exponential_decay_length_penalty": (2, 1.1)}],
    "begin_suppress_tokens": [{"begin_suppress_tokens": [5, 9]}], "sequence_bias": [{"sequence_bias": [[[5], 3.0]]}],
    "guidance_scale": [{"guidance_scale": 1.5}], "watermarking_config": [{"watermarking_config": WatermarkingConfig()}],
    "num_return_sequences": [SAMPLED | {"num_return_sequences": 2}], "output_scores": [NAMED],
    "output_logits": [{"output_logits": True, "return_dict_in_generate": True}],
    "output_attentions": [{"output_attentions": True, "return_dict_in_generate": True}],
    "return_dict_in_generate": [{"return_dict_in_generate": True}], "pad_token_id": [{"pad_token_id": 0}],
    "bos_token_id": [{"bos_token_id": 1}], "eos_token_id": [{"eos_token_id": [2, 9]}],
    "decoder_start_token_id": [{"decoder_start_token_id": 1}], "is_assistant": [{"is_assistant": False}],
    "assistant_model": [HELPED],
    "num_assistant_tokens": [HELPED | {"num_assistant_tokens": 3}],
    "num_assistant_tokens_schedule": [HELPED | {"num_assistant_tokens_schedule": "constant"}],
    "assistant_confidence_threshold": [HELPED | {"assistant_confidence_threshold": 0.2}],
    "prompt_lookup_num_tokens": [ONE | {"prompt_lookup_num_tokens": 2}],
    "max_matching_ngram_size": [ONE | {"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 3}],
    "assistant_lookbehind": [{"assistant_lookbehind": 5}], "target_lookbehind": [{"target_lookbehind": 5}],
    "assistant_ensemble_weight": [{"assistant_ensemble_weight": None}],
    "speculation_type": [{"speculation_type": None}],
    "disable_compile": [{"disable_compile": True}], "low_memory": [{"low_memory": True}],
    "prefill_chunk_size": [{"prefill_chunk_size": 5}], "compile_config": [{"compile_config": None}],
    "continuous_batching_config": [{"continuous_batching_config": None}], "max_cache_len": [{"max_cache_len": 40}],
    "cache_config": [{"cache_config": None}],
    "generation_config": [{"generation_config": GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)}],
    "logits_processor": [{"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(20, 2)])}],
    "stopping_criteria": [{"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(18)])}],
    "prefix_allowed_tokens_fn": [{"prefix_allowed_tokens_fn": lambda row, ids: list(range(3, 40))}],
    "synced_gpus": [{"synced_gpus": False}], "streamer": [ONE | {"streamer": Silent()}],
    "negative_prompt_ids": [AGAINST],
    "negative_prompt_attention_mask": [AGAINST | {"negative_prompt_attention_mask": TEXT[:, :5] * 0 + 1}],
    "inputs": [{}], "custom_generate": [{"custom_generate": lambda model, input_ids, **more: input_ids}],
    "tokenizer": [{"tokenizer": words()}], "assistant_tokenizer": [{"assistant_tokenizer": None}],
    "past_key_values": [{"past_key_values": DynamicCache}],
    "attention_mask": [{"attention_mask": torch.ones_like(TEXT)}],
    "logits_to_keep": [{"logits_to_keep": 1}],
}  # fmt: skip
REFUSED = {
    "use_mtp": [{"use_mtp": True}], "token_healing": [{"token_healing": True, "tokenizer": words()}],
    "cache_implementation": [{"cache_implementation": "static"}], "assistant_early_exit": [{"assistant_early_exit": 2}],
    "use_cache": [{"use_cache": False}],
}  # fmt: skip
"""A sentence of ours; of `use_mtp` transformers' own refusal, where the model has no such heads."""
OTHER_OUTPUT = {"output_hidden_states"}
"""The prompt's hidden states behind the last block are what the pruner makes of them."""
GONE = {"_commit_hash", 
    "penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups", "constraints", "force_words_ids",
    "_from_model_config", "transformers_version",
}  # fmt: skip
"""Of transformers before 5, kept for old files; and what is no argument."""


def tensors(found):
    """Everything in an answer that can be compared."""
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, (tuple, list)):
        return [tensor for part in found for tensor in tensors(part)]
    if isinstance(found, dict):
        return [tensor for name, part in found.items() if name != "past_key_values" for tensor in tensors(part)]
    return []


def run(arguments):
    """What a call gives, or the exception that it raises."""
    more = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0} | arguments
    more |= {name: value() for name, value in more.items() if value is DynamicCache}
    ids = more.pop("inputs", TEXT)
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return tensors(MODEL.generate(ids, **more))
        except Exception as error:
            return error


def test_every_documented_argument_has_its_case():
    documented = {*GenerationConfig().__dict__, *inspect.signature(type(MODEL).generate).parameters}
    assert documented - {"self", "kwargs"} - GONE <= CASES.keys() | REFUSED.keys() | OTHER_OUTPUT


@pytest.mark.parametrize(("name", "case"), [(name, i) for name, cases in CASES.items() for i in range(len(cases))])
def test_an_argument_does_what_it_does_without_a_pruner(name, case):
    expected = run(CASES[name][case])
    with UNSEEN(MODEL):
        found = run(CASES[name][case])
    if isinstance(expected, Exception):
        assert isinstance(found, (UserError, type(expected))), found
        return
    assert not isinstance(found, Exception), found
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.shape == b.shape and torch.allclose(a.double(), b.double(), atol=1e-9), name


@pytest.mark.parametrize(("name", "arguments"), [(name, case) for name, cases in REFUSED.items() for case in cases])
def test_what_cannot_be_pruned_is_refused_in_a_sentence(name, arguments):
    with UNSEEN(MODEL):
        assert isinstance(run(arguments), ValueError if name == "use_mtp" else UserError)


def test_a_keyword_that_changes_attention_is_refused_and_one_that_means_nothing_is_not():
    with UNSEEN(MODEL), torch.no_grad():
        MODEL(TEXT, note="of a server")
        with pytest.raises(UserError, match="position_bias"):
            MODEL(TEXT, position_bias=torch.zeros(1, 4, 14, 14, dtype=torch.float64))
