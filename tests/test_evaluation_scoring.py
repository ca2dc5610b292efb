"""Scores after a prompt: many at once equal one by one, and equal the plain definition."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_llama

from ftp_lightning.evaluation.continuation import continuation_logits, nll_per_token
from ftp_lightning.evaluation.scoring import even_batches, rolling_windows, score_after_prompt, score_in_sequence
from ftp_lightning.pruning import TokenPruner
from ftp_lightning.routing.random import RandomRouter
from ftp_lightning.routing.static import StaticRouter
from ftp_lightning.schedule import Schedule


@pytest.mark.parametrize(
    ("lengths", "size", "batches"),
    [
        ([9] * 8 + [8] * 4, 8, [[9] * 8, [8] * 4]),
        ([9] * 4 + [8] * 8, 8, [[9] * 4, [8] * 8]),  # half full: no padding
        ([9] * 3 + [8] * 8, 8, [[9] * 3 + [8] * 5, [8] * 3]),  # less: padded
        ([5, 4, 3, 2], 2, [[5], [4], [3], [2]]),
        ([], 4, []),
    ],
)
def test_batches_have_one_length_where_they_are_half_full(lengths, size, batches):
    contexts = [(0,) * length for length in lengths]
    assert [[len(context) for context in batch] for batch in even_batches(contexts, size)] == batches


@pytest.fixture(scope="module")
def model():
    return random_llama(48, num_key_value_heads=2, initializer_range=0.3)  # far from uniform: a wrong mask shows


def tokens(rng, length):
    return [rng.randrange(48) for _ in range(length)]  # id 0 among them: it is a token, not padding


@pytest.fixture
def requests():
    """Contexts of different lengths, several choices each, some of a single token."""
    rng = random.Random(1)
    contexts = [tokens(rng, length) for length in (9, 1, 14, 5)]
    choices = [[tokens(rng, length) for length in lengths] for lengths in ((3, 1, 5), (2,), (4, 4), (1, 2, 1, 7))]
    return contexts, choices


def plain(model, context, choice):
    """The definition: one unpadded forward over everything, float64 sum."""
    with torch.no_grad():
        logprobs = model(torch.tensor([[*context, *choice]])).logits[0, len(context) - 1 : -1].log_softmax(-1).double()
    target = torch.tensor(choice)
    return logprobs.gather(1, target[:, None]).sum().item(), bool((logprobs.argmax(-1) == target).all())


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_grouped_scores_equal_plain_ones(model, requests, batch_size):
    contexts, choices = requests
    scores = score_after_prompt(model, contexts, choices, batch_size)
    for context, group, got in zip(contexts, choices, scores, strict=True):
        assert len(got) == len(group)
        for choice, score in zip(group, got, strict=True):
            logprob, greedy = plain(model, context, choice)
            assert score.logprob == pytest.approx(logprob, abs=1e-4)
            assert score.greedy is greedy


def test_sequence_scores_equal_plain_ones(model, requests):
    contexts, choices = requests
    pairs = [(context, choice) for context, group in zip(contexts, choices, strict=True) for choice in group]
    for (context, choice), score in zip(pairs, score_in_sequence(model, *zip(*pairs, strict=True)), strict=True):
        assert (score.logprob, score.greedy) == (
            pytest.approx(plain(model, context, choice)[0], abs=1e-4),
            score.greedy,
        )
        assert score.greedy is plain(model, context, choice)[1]


def test_greedy_choice_is_seen_as_greedy(model):
    context = tokens(random.Random(2), 6)
    text = list(context)
    with torch.no_grad():
        for _ in range(4):
            text.append(model(torch.tensor([text])).logits[0, -1].argmax().item())
    best = text[6:]
    wrong = [*best[:3], (best[3] + 1) % 48]
    right, wrong = score_after_prompt(model, [context], [[best, wrong]], 2)[0]
    assert right.greedy and not wrong.greedy and right.logprob > wrong.logprob


def test_each_context_is_prefilled_once(model, requests):
    contexts, choices = requests
    prefilled = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: prefilled.append(len(kwargs["input_ids"])) if "logits_to_keep" in kwargs else None,
        with_kwargs=True,
    )
    score_after_prompt(model, contexts, choices, 2)
    hook.remove()
    assert prefilled == [len(contexts)]


@given(st.integers(0, 300), st.integers(1, 80), st.integers(1, 80), st.booleans())
def test_rolling_windows_score_every_token_once(length, prompt_tokens, continuation_tokens, has_prefix):
    text = list(range(1, length + 1))
    windows = rolling_windows([0] * has_prefix + text, 0, prompt_tokens, continuation_tokens)
    assert [token for _, continuation in windows for token in continuation] == text
    for k, (prompt, continuation) in enumerate(windows):
        assert prompt == [0, *text[: k * continuation_tokens]][-prompt_tokens:]
        assert 1 <= len(continuation) <= continuation_tokens


@pytest.mark.parametrize("kv", ["evict", "keep"])
@pytest.mark.parametrize("router", [StaticRouter(), RandomRouter(seed=3)])
@pytest.mark.parametrize("batch_size", [1, 100])
def test_grouped_pruned_scores_equal_one_by_one(model, requests, kv, router, batch_size):
    contexts, choices = requests
    with TokenPruner(router, Schedule([0.0, 0.5, 0.75]), kv=kv)(model):
        together = score_after_prompt(model, contexts, choices, batch_size)
        for context, group, got in zip(contexts, choices, together, strict=True):
            for choice, score in zip(group, got, strict=True):
                with torch.no_grad():
                    logits = continuation_logits(model, torch.tensor([[*context, *choice]]), len(context))
                target = torch.tensor([choice])
                assert score.logprob == pytest.approx(-nll_per_token(logits, target).sum().item(), abs=1e-4)
                assert score.greedy is bool((logits.argmax(-1) == target).all())


def test_padding_is_no_token_in_a_routed_sequence(model, requests):
    contexts, choices = requests
    pairs = [(context, choice) for context, group in zip(contexts, choices, strict=True) for choice in group]
    pruner = TokenPruner(StaticRouter(), Schedule([0.0, 0.5, 0.75]))
    with pruner(model):
        together = score_in_sequence(model, *zip(*pairs, strict=True))
        for (context, choice), score in zip(pairs, together, strict=True):
            assert score.logprob == pytest.approx(score_in_sequence(model, [context], [choice])[0].logprob, abs=1e-4)
