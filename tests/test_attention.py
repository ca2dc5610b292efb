"""Attention scores: uniform attention is 1, and chunks change nothing."""

import pytest
import torch

from ftp_lightning.pruning import scores as scoring
from ftp_lightning.pruning.attention import Sight
from ftp_lightning.pruning.continuation_scores import received_by_query
from ftp_lightning.pruning.kept import Tokens
from ftp_lightning.pruning.scores import PromptTable, Tapped, received_attention


def everyone(tokens, batch=1):
    return Tokens(torch.arange(tokens).expand(batch, tokens), torch.ones(batch, tokens, dtype=torch.bool), True)


def test_uniform_attention_scores_one():
    for last in (None, 3):
        tapped = Tapped(torch.zeros(2, 4, 9, 8), torch.randn(2, 2, 9, 8), 1.0, None, None)
        scores, seen = received_attention(tapped, everyone(9, 2), everyone(9, 2), last)
        assert seen.all() and torch.allclose(scores, torch.ones(2, 9))


def test_exact_in_chunks_equals_a_full_matrix():
    torch.manual_seed(0)
    tokens = 300  # more than two chunks
    q, k = torch.randn(1, 4, tokens, 8), torch.randn(1, 2, tokens, 8)
    scores, _ = received_attention(Tapped(q, k, 8**-0.5, None, None), everyone(tokens), everyone(tokens), None)
    causal = torch.ones(tokens, tokens).tril().bool()
    p = ((q @ k.repeat_interleave(2, 1).mT) * 8**-0.5).masked_fill(~causal, -torch.inf).softmax(-1).mean(1)[0]
    n = torch.arange(1, tokens + 1)
    expected = (p * n[:, None]).sum(0) / (tokens - torch.arange(tokens))
    assert torch.allclose(scores[0], expected, atol=1e-5)


def test_sliding_window_and_softcap_are_respected():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 6, 8) * 9, torch.randn(1, 2, 6, 8) * 9
    scores, seen = received_attention(Tapped(q, k, 1.0, 5.0, 2), everyone(6), everyone(6), 2)
    distance = torch.arange(6)[:, None] - torch.arange(6)
    visible = (distance >= 0) & (distance < 2)
    p = (5 * torch.tanh(q @ k.mT / 5)).masked_fill(~visible, -torch.inf).softmax(-1).mean(1)[0]
    assert seen[0].tolist() == [False, False, False, True, True, True]
    assert torch.allclose(scores[0, 3], 2 * p[4, 3]) and torch.allclose(scores[0, 4], p[4:, 4].mean() * 2)


@pytest.mark.parametrize("chunk", [2, 128])
def test_queries_of_kept_tokens_over_all_keys_equal_one_full_matrix(monkeypatch, chunk):
    """Keys that all queries of a chunk see are not masked; each query still says the same of each."""
    monkeypatch.setattr(scoring, "SCORE_CHUNK", chunk)
    draw = torch.Generator().manual_seed(1)
    slots = torch.tensor([[0, 3, 4, 7, 8], [1, 2, 3, 5, 8]])
    queries, keys = Tokens(slots, torch.ones_like(slots, dtype=torch.bool), True), everyone(9, 2)
    q, k = torch.randn(2, 4, 5, 8, generator=draw), torch.randn(2, 2, 9, 8, generator=draw)
    visible = slots[:, :, None] >= torch.arange(9)
    logits = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(~visible[:, None], -torch.inf)
    said = logits.softmax(-1).mean(1) * visible.sum(-1, keepdim=True)
    tapped = Tapped(q, k, 8**-0.5, None, None)
    each, seen = received_by_query(tapped, queries, keys)
    assert torch.equal(seen, visible) and torch.allclose(each, said, atol=1e-6)
    for last, first in ((None, 0), (3, 2)):
        score, seen = received_attention(tapped, queries, keys, last)
        count = visible[:, first:].sum(1)
        assert torch.equal(seen, count > 0)
        assert torch.allclose(score, said[:, first:].sum(1) / count.clamp(min=1), atol=1e-6)


@pytest.mark.parametrize("places", [None, torch.tensor([[0, 1, 3]])])
def test_a_key_that_no_query_sees_keeps_its_latest_score(places):
    """Beyond a sliding window, or a filler: what attention says of it there is no score."""
    table = PromptTable(torch.ones(1, 4))
    table.write(torch.tensor([[2.0, 3.0, 4.0, 5.0]]), torch.ones(1, 4, dtype=torch.bool), None)
    scores, seen = torch.tensor([[6.0, 0.0, 7.0, 8.0]]), torch.tensor([[True, False, True, True]])
    if places is None:
        table.write(scores, seen, None)
        assert table.own.tolist() == [[6, 3, 7, 8]]
    else:  # the third token was evicted: nothing is said of it
        table.write(scores.gather(1, places), seen.gather(1, places), places)
        assert table.own.tolist() == [[6, 3, 4, 8]]


@pytest.mark.parametrize("past", [0, 2, 5])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 7], [0, 3, 4, 7]])
def test_no_key_that_a_chunk_of_queries_sees_is_left_out(kept, window, past):
    slots = past + torch.tensor([kept])
    queries, earlier = Tokens(slots, torch.ones_like(slots, dtype=torch.bool), True), everyone(past)
    for keys, complete in ((everyone(past + 8), True), (earlier.followed_by(queries), False)):
        sight = Sight(queries, keys, window, new=keys.slots.shape[1] - past, complete=complete)
        for start in range(0, len(kept), 2):
            low, high = sight.key_range(start, start + 2)
            seen = sight.mask(start, start + 2, 0, keys.slots.shape[1])[0, 0].any(0).nonzero()
            assert low <= seen.min() and seen.max() < high
