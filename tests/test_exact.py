"""The Gaussian mixture: denoiser against Tweedie's formula and quadrature, posterior against Bayes' rule."""

import math

import pytest
import torch

from ud2m.physics import Inpainting, SuperResolution, UniformBlur
from ud2m.priors.gaussian_mixture import GaussianMixture, dense_matrix

SHAPE = (1, 4, 4)
SIZE = 16


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def mixture():
    root = torch.randn(3, SIZE, SIZE, generator=generator(), dtype=torch.float64)
    covariances = 0.02 * root @ root.transpose(1, 2) / SIZE + 1e-4 * torch.eye(SIZE, dtype=torch.float64)
    means = torch.rand(3, *SHAPE, generator=generator(1), dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.5, 0.2, 0.3]), means, covariances)


def test_the_density_of_one_variable_integrates_to_one_and_gives_the_denoiser():
    # Oracle: quadrature over x0 of p(x0) N(x_sigma; x0, sigma^2)
    weights, means, deviations = (0.3, 0.7), (0.2, 0.8), (0.05, 0.1)
    mixture = GaussianMixture(
        torch.tensor(weights), torch.tensor(means).view(2, 1, 1, 1), torch.tensor(deviations).square().view(2, 1, 1)
    )
    grid = torch.linspace(-2, 3, 50001, dtype=torch.float64)
    step = (grid[1] - grid[0]).item()
    density = sum(
        w * torch.exp(-0.5 * ((grid - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
        for w, m, s in zip(weights, means, deviations, strict=True)
    )
    torch.testing.assert_close(mixture.log_density(grid.view(-1, 1, 1, 1)).exp(), density, atol=1e-9, rtol=1e-6)
    for sigma in (0.01, 0.2, 5.0):
        for x in (0.1, 0.45, 0.9):
            joint = density * torch.exp(-0.5 * ((x - grid) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
            x_sigma, level = torch.full((1, 1, 1, 1), x, dtype=torch.float64), torch.tensor([sigma])
            found = mixture.log_density(x_sigma, sigma).exp().item()
            assert found == pytest.approx(joint.sum().item() * step, rel=1e-6)
            expected = (grid * joint).sum() / joint.sum()
            assert mixture(x_sigma, level).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0, 50.0])
def test_the_denoiser_is_tweedies_formula(mixture, sigma):
    x = (mixture.sample(5, generator(2)) + sigma * torch.randn(5, *SHAPE, generator=generator(3))).requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_density(x, sigma).sum(), x)
    expected = x + sigma**2 * score
    torch.testing.assert_close(mixture(x, torch.full((5,), sigma)), expected, atol=1e-7 * max(1, sigma), rtol=1e-7)


@pytest.mark.parametrize("family", [UniformBlur(3), SuperResolution(2, "box"), Inpainting(0.6)])
def test_the_posterior_is_bayes_rule(mixture, family):
    # Oracle: log p(x | y) - log p(x) - log p(y | x) is the same number for all x
    physics = family.draw(1, SHAPE, generator(4))
    x0 = mixture.sample(1, generator(5))
    y = physics.A(x0) + 0.05 * torch.randn(physics.A(x0).shape, generator=generator(6))
    posterior = mixture.posterior(y, physics, 0.05)
    x = mixture.sample(20, generator(7)) * 0.3 + 0.7 * posterior.sample(20, generator(8))
    misfit = torch.cat([(physics.A(row[None]) - y).flatten(1).square().sum(1) for row in x]) / (2 * 0.05**2)
    constant = posterior.log_density(x) - mixture.log_density(x) + misfit
    torch.testing.assert_close(constant, constant[:1].expand(20), atol=1e-5, rtol=1e-7)


def test_draws_have_the_moments_of_the_mixture(mixture):
    draws = mixture.sample(200_000, generator(9)).flatten(1)
    torch.testing.assert_close(draws.mean(0), mixture.mean().flatten(), atol=3e-3, rtol=0)
    torch.testing.assert_close(draws.T.cov(), mixture.covariance(), atol=3e-3, rtol=0)


def test_a_fit_finds_the_components_it_was_drawn_from(mixture):
    draws = mixture.sample(6000, generator(10)).float()
    fitted = GaussianMixture.fit(draws, 3)
    torch.testing.assert_close(fitted.mean(), mixture.mean(), atol=0.02, rtol=0)
    held_out = mixture.sample(2000, generator(11))
    assert fitted.log_density(held_out).mean() > mixture.log_density(held_out).mean() - 0.2


def test_the_dense_matrix_is_the_operator():
    physics, x = SuperResolution(2, "box").draw(1, (2, 4, 6)), torch.rand(1, 2, 4, 6, dtype=torch.float64)
    matrix = dense_matrix(physics, (2, 4, 6))
    torch.testing.assert_close(matrix @ x.flatten(), physics.A(x).flatten())


def test_what_is_no_mixture_is_refused(mixture):
    means, eye = torch.zeros(2, *SHAPE), torch.eye(SIZE).expand(2, SIZE, SIZE)
    with pytest.raises(ValueError, match="positive weights"):
        GaussianMixture(torch.tensor([1.0, 0.0]), means, eye)
    with pytest.raises(ValueError, match=r"covariances \[J, n, n\], got \[2\], \[2, 1, 4, 4\] and \[16, 16\]"):
        GaussianMixture(torch.ones(2), means, torch.eye(SIZE))
    with pytest.raises(ValueError, match="negative eigenvalue -1"):
        GaussianMixture(torch.ones(2), means, -eye)
    physics = Inpainting().draw(1, SHAPE)
    with pytest.raises(ValueError, match="positive sigma_y"):
        mixture.posterior(torch.zeros(1, *SHAPE), physics, 0.0)
