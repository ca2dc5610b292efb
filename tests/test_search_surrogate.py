"""The surrogate: Gaussian processes by the closed form, against scikit-learn's and against what they are fitted to."""

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Kernel as SklearnKernel

from ftp_lightning.search.surrogate import EVICT_APART, MOST_POINTS, Kernel, Process, Surrogate, _distances

BLOCKS = 6


def draws(count, seed=0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random((count, BLOCKS)) < 0.2, 0.0, rng.random((count, BLOCKS)))


def score(sparsity):
    """Effects of each block alone, and of neighbours together."""
    weights = np.linspace(0.5, 2.0, BLOCKS)
    return np.sin(2 * sparsity) @ weights + (sparsity[:, 1:] * sparsity[:, :-1]).sum(1)


class AsSklearn(SklearnKernel):
    """Our kernel with its noise, as scikit-learn asks for it."""

    def __init__(self, ours):
        self.ours = ours

    def __call__(self, a, b=None, eval_gradient=False):
        found = self.ours(_distances(a, a if b is None else b))
        return found if b is not None else found + self.ours.noise * np.eye(len(a))

    def diag(self, a):
        return np.ones(len(a))

    def is_stationary(self):
        return True


@pytest.mark.parametrize("kernel", [Kernel(), Kernel(alone=0.2, joint=1.4, share=0.8, noise=0.02)])
def test_mean_deviation_and_likelihood_are_those_of_sklearn(kernel):
    known, asked = draws(30), draws(20, seed=1)
    process = Process(kernel(_distances(known, known)), score(known), kernel.noise)
    other = GaussianProcessRegressor(AsSklearn(kernel), alpha=0.0, optimizer=None)
    other.fit(known, (score(known) - score(known).mean()) / process.scale)
    mean, deviation = other.predict(asked, return_std=True)
    found = process(kernel(_distances(asked, known)))
    assert found[0] == pytest.approx(score(known).mean() + process.scale * mean, rel=1e-8)
    assert found[1] == pytest.approx(process.scale * deviation, rel=1e-6)
    constant = 30 / 2 * (1 + np.log(2 * np.pi))  # the likelihood at the likeliest scale, from scaled scores
    assert process.likelihood == pytest.approx(
        other.log_marginal_likelihood_value_ + constant - 30 * np.log(process.scale), rel=1e-8
    )


def test_the_kernel_is_a_covariance_and_one_at_distance_zero():
    points = draws(60)
    covariance = Kernel()(_distances(points, points))
    assert np.diag(covariance) == pytest.approx(1.0) and np.array_equal(covariance, covariance.T)
    assert np.linalg.eigvalsh(covariance).min() > -1e-10


def measured(sparsity, chunks=((0, 1, 2),)):
    """Losses exp(score * (1 + chunk)) of the chunks that each schedule is given in turn."""
    scores = score(sparsity)
    return [{c: float(np.exp(s * (1 + c) / 3)) for c in chunks[i % len(chunks)]} for i, s in enumerate(scores)]


def test_it_expects_what_was_measured_and_ranks_what_was_not():
    known, asked = draws(80), draws(200, seed=1)
    surrogate = Surrogate.fitted(known, measured(known), [2, 2, 1])
    truth = [np.average(list(one.values()), weights=[2, 2, 1]) for one in measured(asked)]
    assert np.corrcoef(np.log(surrogate(asked)), np.log(truth))[0, 1] > 0.9
    assert (surrogate(asked, deviations=1.0) < surrogate(asked)).all()


def test_what_was_measured_on_some_chunks_counts_for_them():
    """Every schedule on two chunks of three says more than a third of the schedules on all."""
    known, asked = draws(60), draws(200, seed=1)
    truth = np.log([np.mean(list(one.values())) for one in measured(asked)])
    some = Surrogate.fitted(known, measured(known, ((0, 1), (1, 2), (0, 2))), [1, 1, 1])
    few = Surrogate.fitted(known[::3], measured(known[::3]), [1, 1, 1])
    errors = [np.square(np.log(surrogate(asked)) - truth).mean() for surrogate in (some, few)]
    assert errors[0] < errors[1]


def test_believing_changes_no_expectation_and_takes_the_doubt_away():
    known, asked = draws(40), draws(5, seed=1)
    surrogate = Surrogate.fitted(known, measured(known), [1, 1, 1])
    sure = surrogate.believing(asked)
    assert sure(asked) == pytest.approx(surrogate(asked), rel=0.02)
    doubt, before = (np.log(one(asked) / one(asked, deviations=1.0)) for one in (sure, surrogate))
    assert (doubt < 0.5 * before).all()


def test_only_the_best_are_looked_at_and_losses_of_zero_are_no_trouble():
    known = draws(MOST_POINTS + 50)
    surrogate = Surrogate(known, score(known)[:, None], [1], Kernel())
    assert len(surrogate.logs) == MOST_POINTS and surrogate.logs.max() < np.sort(score(known))[MOST_POINTS]
    still = Surrogate.fitted(known[:4], [{0: 0.0}] * 4, [1])
    assert np.isfinite(still(known)).all()


def test_two_modes_are_the_farther_apart_the_more_tokens_skip():
    keep, evict = np.array([[0.2], [0.8]]), np.array([[-0.2], [-0.8]])
    apart = _distances(keep, evict)[..., 0].diagonal()
    assert apart == pytest.approx([0.2 * EVICT_APART, 0.8 * EVICT_APART])
    assert _distances(keep, keep)[..., 0] == pytest.approx(np.array([[0, 0.6], [0.6, 0]]))
    assert np.linalg.eigvalsh(Kernel()(_distances(*[np.linspace(-1, 1, 41)[:, None]] * 2))).min() > -1e-9
