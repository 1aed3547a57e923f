"""Measures of calibration against cases whose answer is known."""

import itertools
import math

import pytest
import scipy.stats
import torch

from ud2m.evaluation.calibration import (
    bootstrap_interval,
    coverage,
    energy_score,
    gaussian_wasserstein2,
    ranks,
    residual_p_value,
    wasserstein2,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def test_ranks_of_a_calibrated_sampler_are_uniform_and_of_a_narrow_one_are_not():
    x0, samples = gaussian(20000, 1), gaussian(20000, 9, 1, seed=1)
    for scale, uniform in ((1.0, True), (0.5, False)):
        counts = torch.bincount(ranks(scale * samples, x0, generator(2)).flatten(), minlength=10)
        assert (scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3) == uniform
    assert counts[0] > counts[5] * 2  # too narrow: truths lie outside


def test_ties_are_broken_evenly():
    counts = torch.bincount(ranks(torch.zeros(20000, 4, 1), torch.zeros(20000, 1), generator(3)).flatten())
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert ranks(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[2.5]])).item() == 2


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
def test_coverage_is_the_share_that_it_should_be(level):
    x0, samples = gaussian(40000, 1), gaussian(40000, 19, 1, seed=1)
    found, right = coverage(ranks(samples, x0, generator(2)), 19, level)
    assert right == pytest.approx(level, abs=0.05)
    assert found == pytest.approx(right, abs=0.01)
    # Oracle: of an infinitely wide sampler everything is covered; of one of half the width, what the normal says
    narrow, _ = coverage(ranks(0.5 * samples, x0, generator(2)), 19, level)
    ideal = 2 * scipy.stats.norm.cdf(0.5 * scipy.stats.norm.ppf((1 + right) / 2)) - 1
    assert narrow == pytest.approx(ideal, abs=0.06)
    assert coverage(ranks(100 * samples, x0, generator(2)), 19, level)[0] > 0.9 * min(1, 2 * right)


def test_the_energy_score_is_lowest_for_the_truth_and_has_its_closed_form():
    x0, samples = gaussian(4000, 1), gaussian(4000, 16, 1, seed=1)
    scores = {scale: energy_score(scale * samples, x0).mean().item() for scale in (0.5, 1.0, 1.5)}
    assert scores[1.0] == min(scores.values())
    # E|X - x0| = 2 / sqrt(pi) for two standard normals, and half of it is subtracted
    assert scores[1.0] == pytest.approx(1 / math.sqrt(math.pi), abs=0.03)


def test_wasserstein_is_the_best_of_all_matchings():
    one, other = gaussian(6, 2, 2), gaussian(6, 2, 2, seed=1)
    best = min(
        (one - other[list(order)]).flatten(1).square().sum(1).mean().sqrt().item()
        for order in itertools.permutations(range(6))
    )
    assert wasserstein2(one, other) == pytest.approx(best)
    assert wasserstein2(one, one.flip(0)) == pytest.approx(0, abs=1e-7)
    assert wasserstein2(one, one + 3) == pytest.approx(3 * 2)  # a shift of 3 in 4 dimensions


@pytest.mark.slow
def test_wasserstein_of_gaussians_is_that_of_many_draws():
    root = gaussian(2, 2, seed=2)
    covariance, other = root @ root.T + 0.1 * torch.eye(2), torch.diag(torch.tensor([0.2, 1.0])).double()
    mean, other_mean = torch.zeros(2), torch.tensor([1.0, -1.0])
    exact = gaussian_wasserstein2(mean, covariance, other_mean, other)
    draws = gaussian(1500, 2, seed=3) @ torch.linalg.cholesky(covariance).T
    others = other_mean + gaussian(1500, 2, seed=4) @ torch.linalg.cholesky(other).T
    assert exact == pytest.approx(wasserstein2(draws, others), rel=0.05)
    same = gaussian_wasserstein2(mean, covariance, mean, covariance)
    assert same == pytest.approx(0, abs=1e-6)


def test_p_values_of_residuals_are_those_of_chi_squared_and_uniform_for_noise():
    residual = torch.tensor([0.8, 1.0, 1.3])
    expected = [scipy.stats.chi2.sf(50 * r**2, 50) for r in residual.tolist()]
    assert residual_p_value(residual, 50).tolist() == pytest.approx(expected, rel=1e-5)
    noise = gaussian(5000, 50).norm(dim=1) / math.sqrt(50)
    assert scipy.stats.kstest(residual_p_value(noise, 50).numpy(), "uniform").pvalue > 1e-3


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        low, high = bootstrap_interval(gaussian(40, seed=seed), 0.9, 500, generator(seed))
        hits += low < 0 < high
    assert 0.82 < hits / 200 < 0.96


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match=r"must fit x0 \[B, ...\], got \[2, 3, 4\] and \[2, 5\]"):
        ranks(torch.zeros(2, 3, 4), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"inside \(0, 1\), got 90"):
        coverage(torch.zeros(3), 4, 90)
    with pytest.raises(ValueError, match="at least 2 samples"):
        energy_score(torch.zeros(2, 1, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="equally many points"):
        wasserstein2(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="at least 2 images"):
        bootstrap_interval(torch.zeros(1))
