"""The default schedule on the embedded model and on models that others trained: text stays text."""

from contextlib import nullcontext

import pytest
import torch

from ftp_lightning import Schedule, StaticRouter, TokenPruner, UserError
from ftp_lightning.models import load

ANSWERS = {
    "embedded": None,
    "smollm2-135m-instruct": ("The capital of France is", "Paris"),
    "gemma3-270m": ("Water boils at a temperature of", "100"),
}
"""A question that the dense model answers, and the answer; the embedded model knows stories alone."""

STORY = (
    "The old woman lived in a small house at the end of the village. Every morning she walked down to the river with "
    "two buckets, and every evening she lit a lamp in the window, so that the fishermen could find the way home. One "
    "winter the snow was so deep that nobody could leave the house for three days. On the fourth day a boy came to the "
    "door. He was cold and hungry, and he said that his father's boat had not come back. The woman gave him bread and "
    "warm milk, put on her coat, took the lamp out of the window and went with him to the river. They walked along the "
)
GOES_ON = "bank for an hour, and then they saw the boat. It lay on the ice, and the father stood beside it and waved."
NATS = {0.1: 0.15, 0.3: 0.35, 0.5: 0.9}
"""Most KL to dense per token of GOES_ON that a budget may cost; uniform `keep` costs 8 to 12 at any of them."""


SLOW = "gemma3-270m"  # its vocabulary takes ten seconds to read
MODELS = [pytest.param(name, marks=[pytest.mark.slow] if name == SLOW else []) for name in ANSWERS]


@pytest.fixture(scope="module", params=MODELS)
def loaded(request):
    try:
        return request.param, *load(request.param)
    except UserError as error:
        pytest.skip(f"{request.param} is not installed: {str(error).splitlines()[0]}")


def default_pruner(model, budget):
    return TokenPruner(StaticRouter(), Schedule.default(model.config.get_text_config().num_hidden_layers, budget))


def continuation(model, tokenizer, pruner=None):
    """(tokens, vocabulary) log-probabilities of GOES_ON after STORY, read through the cache."""
    prompt = tokenizer(STORY, return_tensors="pt").input_ids
    more = tokenizer(GOES_ON, return_tensors="pt", add_special_tokens=False).input_ids
    with pruner(model) if pruner else nullcontext(), torch.no_grad():
        cache = model(prompt, logits_to_keep=1).past_key_values
        return model(more, past_key_values=cache).logits[0].log_softmax(-1)


@pytest.mark.parametrize("budget", list(NATS))
def test_a_paragraph_goes_on_as_it_did(loaded, budget):
    _, model, tokenizer = loaded
    dense, pruned = continuation(model, tokenizer), continuation(model, tokenizer, default_pruner(model, budget))
    assert (dense.exp() * (dense - pruned)).sum(-1).mean() < NATS[budget]


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.3])
def test_a_short_question_is_still_answered(loaded, budget):
    name, model, tokenizer = loaded
    if ANSWERS[name] is None:
        pytest.skip(f"{name} knows no facts")
    question, answer = ANSWERS[name]
    inputs = tokenizer(question, return_tensors="pt")
    with (pruner := default_pruner(model, budget))(model):
        found = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(found[0, inputs.input_ids.shape[1] :])
    assert answer in text, text
    assert any(pruner.trace.prompt.sparsity)  # it was pruned
