"""Routers, factors and choice against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftp_lightning import DynamicRouter, FixedRouter, RandomRouter, StaticRouter
from ftp_lightning.pruning.decide import RoutedTokens, choose_threshold, choose_topk
from ftp_lightning.routing.base import RoutingContext
from ftp_lightning.routing.learned import average_rank, factors
from ftp_lightning.routing.random import uniform_hash


def context(tokens, sparsity=0.3, kept=None, attention=None, block=1, batch=1):
    real = torch.ones(batch, tokens, dtype=torch.bool)
    part = RoutedTokens.of(real, padded=False)
    kept = part.counts(sparsity) if kept is None else (kept,) * batch
    table = torch.ones(batch, tokens) if attention is None else attention
    lengths, counts = (torch.tensor(n)[:, None] for n in (part.lengths, kept))
    return RoutingContext(block, sparsity, real, part.position, lengths, counts, table)


def test_static_order_is_the_papers():
    order = StaticRouter().score(context(6))[0].argsort(descending=True)
    assert order.tolist() == [0, 5, 4, 3, 2, 1]
    assert StaticRouter().probability(context(6, kept=3))[0].tolist() == [1, 0, 0, 0, 1, 1]


def test_dynamic_router_has_450_parameters():
    assert DynamicRouter().parameter_count == 450 == 4 * 64 + 64 + 64 * 2 + 2
    assert not DynamicRouter(names=("position", "sparsity")).needs.attention
    with pytest.raises(ValueError, match="unknown factors"):
        DynamicRouter(names=("position", "taste"))


def test_factors_are_as_written():
    attention = torch.tensor([[3.0, 0.5, 0.5 + 5e-7, 2.0]])
    f = factors(context(4, sparsity=0.25, attention=attention))[0]
    assert torch.allclose(f[:, 0], torch.tensor([0, 1 / 3, 2 / 3, 1]))
    assert torch.allclose(f[:, 1], attention[0].log1p())
    assert torch.allclose(f[:, 2], torch.tensor([1.0, 0.5 / 3, 0.5 / 3, 2 / 3]))  # 5e-7 apart is a tie
    assert f[:, 3].tolist() == [0.25] * 4
    assert factors(context(1))[0, 0, 0] == 1.0  # a single token has position 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(0, 4))
def test_average_rank_equals_the_slow_way(values, padding):
    row = torch.tensor([[float(v) for v in values] + [9.0] * padding])
    real = torch.tensor([[True] * len(values) + [False] * padding])
    got = average_rank(row, real)[0, : len(values)]
    below = [sum(v < w for v in values) for w in values]
    same = [sum(v == w for v in values) for w in values]
    assert torch.allclose(got, torch.tensor([b + (s - 1) / 2 for b, s in zip(below, same)]))


def test_random_router_is_uniform_and_knows_no_batch():
    u = uniform_hash(0, 3, torch.arange(20000))
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.std() - 12**-0.5) < 0.01 and 0 <= u.min() and u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-square, 19 degrees of freedom, p ~ 0.001
    pairs = torch.stack([uniform_hash(seed, block, torch.arange(2000)) for seed in (0, 1) for block in (0, 1)])
    assert (torch.corrcoef(pairs) - torch.eye(4)).abs().max() < 0.1
    assert abs((u[1:] * u[:-1]).mean() - 0.25) < 0.01
    one, many = RandomRouter(7).score(context(9)), RandomRouter(7).score(context(9, batch=3))
    assert torch.equal(many, one.expand(3, 9))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 15), min_size=1, max_size=4), st.floats(0, 1), st.booleans(), st.integers(0, 9))
def test_topk_counts_and_reserves(lengths, sparsity, left, seed):
    tokens = max(lengths)
    real = torch.zeros(len(lengths), tokens, dtype=torch.bool)
    for row, n in enumerate(lengths):
        real[row, tokens - n if left else 0 : tokens if left else n] = True
    part = RoutedTokens.of(real, padded=True)
    kept = part.counts(sparsity)
    keep = choose_topk(torch.rand(real.shape, generator=torch.Generator().manual_seed(seed)), part, kept)
    assert tuple(keep.sum(1).tolist()) == kept and not (keep & ~real).any()
    assert (keep | ~part.reserved).all()
    for row in range(len(lengths)):
        assert real[row].nonzero()[[0, -1], 0].tolist() == part.reserved[row].nonzero()[[0, -1], 0].tolist()


def test_topk_breaks_ties_by_the_earlier_token():
    part = RoutedTokens.of(torch.ones(1, 6, dtype=torch.bool), padded=False)
    assert choose_topk(torch.zeros(1, 6), part, (4,))[0].tolist() == [1, 1, 1, 0, 0, 1]


def test_threshold_keeps_what_exceeds_it_and_the_reserved():
    part = RoutedTokens.of(torch.ones(1, 5, dtype=torch.bool), padded=False)
    p = torch.tensor([[0.1, 0.5, 0.51, 0.2, 0.3]])
    assert choose_threshold(p, part, 0.5)[0].tolist() == [1, 0, 1, 0, 1]


def test_fixed_router_wants_one_shape():
    with pytest.raises(ValueError, match="all alike"):
        FixedRouter([torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)])


def test_fixed_router_wants_decisions_and_no_probabilities():
    with pytest.raises(ValueError, match="masks of bool"):
        FixedRouter([torch.rand(1, 3)])
    for dtype in (torch.int64, torch.float32):
        assert FixedRouter([torch.ones(1, 3, dtype=dtype)]).keep[0].dtype == torch.bool
