"""Measures of redundant positions, from counts, equal what the decisions themselves say."""

import itertools
import math

import pytest
import torch

from ftp_lightning.evaluation.redundancy import (
    chance_jaccard,
    explained_by_position,
    guessed_from_position,
    guessed_without_position,
    pooled_jaccard,
)


def decisions(texts, positions, seed, share=0.4):
    return torch.rand(texts, positions, generator=torch.Generator().manual_seed(seed)) < share


def counts(decided):
    return decided.double().sum(0)


@pytest.mark.parametrize("seed", range(5))
def test_the_pooled_jaccard_is_a_ratio_of_sums_over_pairs(seed):
    decided = decisions(5, 12, seed)
    pairs = list(itertools.combinations(decided, 2))
    both, either = (sum(int(op(a, b).sum()) for a, b in pairs) for op in (torch.logical_and, torch.logical_or))
    assert pooled_jaccard(counts(decided), 5).item() == pytest.approx(both / either)


def test_the_same_positions_everywhere_overlap_fully_and_disjoint_ones_not_at_all():
    same = torch.tensor([[0, 3, 3, 0.0], [1, 1, 1, 0]])
    assert pooled_jaccard(same, 3).tolist() == [1.0, 0.0]
    assert explained_by_position(same[0], 3).item() == pytest.approx(1.0)
    assert guessed_from_position(same[0], 3).item() == 1.0


def test_positions_that_mean_nothing_are_told_as_such():
    decided = decisions(4, 20_000, 0)
    found, share = counts(decided), decided.double().mean().item()
    assert pooled_jaccard(found, 4).item() == pytest.approx(share / (2 - share), abs=0.01)
    assert chance_jaccard(found, 4).item() == pytest.approx(share / (2 - share))
    assert explained_by_position(found, 4).item() == pytest.approx(0.0, abs=0.02)
    assert guessed_from_position(found, 4).item() < guessed_without_position(found, 4).item()
    assert guessed_without_position(found, 4).item() == pytest.approx(1 - share, abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_the_explained_share_is_the_adjusted_r2_of_the_means_per_position(seed):
    decided = decisions(6, 9, seed).double()
    within = ((decided - decided.mean(0)) ** 2).sum() / (6 * 9 - 9)
    total = ((decided - decided.mean()) ** 2).sum() / (6 * 9 - 1)
    assert explained_by_position(counts(decided), 6).item() == pytest.approx((1 - within / total).item())


@pytest.mark.parametrize("seed", range(3))
def test_a_guess_is_the_majority_of_the_other_texts(seed):
    decided, right = decisions(5, 7, seed, 0.5), 0.0
    for text, position in itertools.product(range(5), range(7)):
        others = [bool(decided[other, position]) for other in range(5) if other != text]
        votes = sum(others) - len(others) / 2
        right += 0.5 if votes == 0 else float((votes > 0) == bool(decided[text, position]))
    assert guessed_from_position(counts(decided), 5).item() == pytest.approx(right / 35)


def test_what_is_not_defined_is_nan():
    one, none = torch.tensor([1.0, 0, 1]), torch.zeros(3, dtype=torch.float64)
    for measure in (pooled_jaccard, explained_by_position, guessed_from_position):
        assert math.isnan(measure(one, 1).item())
    assert math.isnan(pooled_jaccard(none, 4).item()) and math.isnan(explained_by_position(none, 4).item())
