"""The options of the attention score, against eager attention; float32 whatever the model's precision."""

import pytest
import torch

from ftp_lightning.pruning import scores as scoring
from ftp_lightning.pruning.scores import (
    Tapped,
    attention_rank,
    attention_sums,
    last_logits,
    received_attention,
    received_by_query,
)
from ftp_lightning.pruning.tokens import Tokens


def everyone(tokens, batch=1):
    return Tokens(torch.arange(tokens).expand(batch, tokens), torch.ones(batch, tokens, dtype=torch.bool), True)


def drawn(tokens, dtype=torch.float32, size=16):
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, tokens, size, generator=draw), torch.randn(1, 2, tokens, size, generator=draw)
    return Tapped(q.to(dtype), k.to(dtype), 4 * size**-0.5, None, None), everyone(tokens)


def all_scores(tapped, tokens):
    span = len(tokens.slots[0])
    return [
        received_attention(tapped, tokens, tokens, 8)[0],
        received_attention(tapped, tokens, tokens, None)[0],
        received_by_query(tapped, tokens, tokens)[0],
        *(read(tapped, tokens, tokens, span)[0] for read in (attention_sums, last_logits, attention_rank)),
    ]


def test_autocast_moves_no_score():
    tapped, tokens = drawn(150)
    expected = all_scores(tapped, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = all_scores(tapped, tokens)
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keys_are_cast_in_chunks(monkeypatch, dtype):
    """No float32 tensor holds all keys, and the scores are those of float32 queries and keys, within 1e-5."""
    tapped, tokens = drawn(150, dtype)
    exact = Tapped(tapped.query.float(), tapped.key.float(), tapped.scaling, None, None)
    expected, sizes, cast = all_scores(exact, tokens), [], torch.Tensor.float
    monkeypatch.setattr(scoring, "KEY_CHUNK", 40)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: sizes.append(x.shape) or cast(x))
    found = all_scores(tapped, tokens)
    monkeypatch.undo()
    assert not {tuple(shape) for shape in sizes} & {(1, 2, keys, 16) for keys in (128, 150)}
    assert (1, 2, 40, 16) in sizes
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected, strict=True))
