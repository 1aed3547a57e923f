import pytest
import torch
from dense_prox import dense_prox
from measuring import evaluate
from operators import CASES, dense, generator
from tiny import SIZE, tiny_prior
from torch import nn

from ud2m.bars import Forecast, progress_bar
from ud2m.evaluation import scores
from ud2m.evaluation.comparison import best_settings
from ud2m.evaluation.scores import distance_score
from ud2m.physics import CircularBlur, GaussianBlur, Inpainting, Observation, Problem, SuperResolution, observe
from ud2m.samplers.base import Sampler, seeds_from
from ud2m.samplers.latino import Latino, LatinoSetting, PseudoInverse, WarmStart
from ud2m.unfolded.warm_start import PinvStart, SmoothingStart

SHAPE = (3, SIZE, SIZE)
each_family = pytest.mark.parametrize("family", [GaussianBlur(), SuperResolution(), Inpainting()])


def images(batch=2, seed=0):
    return torch.rand(batch, *SHAPE, generator=generator(seed))


def observation(family, batch=2, sigma_y=0.05):
    physics = family.draw(batch, SHAPE, generator(1))
    return observe(physics, images(batch), sigma_y, generator(2)), physics


# --- without a network ---------------------------------------------------------------------------------------


@each_family
def test_pseudo_inverse_is_every_sample(family):
    y, physics = observation(family)
    samples = PseudoInverse()(y, physics, 0.05, num_samples=3)
    assert samples.shape == (2, 3, *SHAPE)
    for sample in samples.unbind(1):
        assert torch.equal(sample, physics.A_dagger(y).clamp(0, 1))


@each_family
@pytest.mark.parametrize("start", [SmoothingStart(scales=(8, 4)), PinvStart()])
def test_warm_start_is_that_of_a_network_that_sees_pure_noise(family, start):
    y, physics = observation(family)
    samples = WarmStart(start)(y, physics, 0.05, num_samples=2)
    level = torch.full((2,), 1e6)
    noise = 1e6 * torch.randn(2, *SHAPE, generator=generator(3))
    expected = start(noise, level, Observation.of(y, physics, 0.05)).clamp(0, 1)
    for sample in samples.unbind(1):
        torch.testing.assert_close(sample, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", [WarmStart(SmoothingStart()), Latino(tiny_prior(), LatinoSetting(2))])
def test_a_noise_level_of_zero_is_refused(method):
    with pytest.raises(ValueError, match="sigma_y must be a positive noise level"):
        method(*observation(Inpainting()), sigma_y=0.0)


# --- zero-shot LATINO ----------------------------------------------------------------------------------------


def test_levels_fall_geometrically():
    levels = LatinoSetting(num_levels=4, tau_first=0.8, tau_last=0.1).levels()
    assert levels == pytest.approx([0.8, 0.4, 0.2, 0.1])
    assert LatinoSetting(num_levels=1, tau_first=0.3).levels() == pytest.approx([0.3])


class Denoiser(nn.Module):
    """A function as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x_sigma, sigma):
        return self.function(x_sigma, sigma)


def squash(x_sigma, sigma):
    return torch.sigmoid(3 * x_sigma - 1) / (1 + sigma.view(-1, 1, 1, 1))


@pytest.mark.parametrize("case", ["blur", "blur per sample", "sr 2", "inpainting"])
def test_latino_is_the_loop_of_its_algorithm(case):
    physics, shape = CASES[case]()
    sigma_y = torch.tensor([0.02, 0.1], dtype=torch.float64)
    x0 = torch.rand(2, *shape, generator=generator(0), dtype=torch.float64)
    y = observe(physics, x0, sigma_y, generator(5))
    setting = LatinoSetting(num_levels=3, tau_first=0.5, tau_last=0.02, width=1.5)
    samples = Latino(Denoiser(squash), setting, PinvStart())(y, physics, sigma_y, num_samples=2, generator=generator(6))

    A = dense(physics.A, shape)
    streams = [generator(seed) for seed in seeds_from(generator(6), 4)]  # of both samples of either observation
    start = (torch.linalg.pinv(A, rtol=1e-5) @ y.flatten(1).unsqueeze(-1)).view_as(x0).clamp(0, 1)
    for s, sample in enumerate(samples.unbind(1)):
        x = start
        for tau in (0.5, 0.1, 0.02):
            noise = [torch.randn(shape, generator=streams[2 * b + s], dtype=torch.float64) for b in (0, 1)]
            z = x + tau * torch.stack(noise)
            x = 1 / (1 + torch.exp(1 - 3 * z)) / (1 + tau)
            nothing, one = torch.full((2,), torch.inf, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
            x = dense_prox(A, y, x, x, nothing, (1.5 * tau) ** 2 * one, one, sigma_y)
        torch.testing.assert_close(sample, x.clamp(0, 1), rtol=0, atol=1e-7)


def test_latino_with_the_exact_denoiser_of_a_gaussian_beats_its_start():
    """x0 ~ N(1/2, K K^T) with a smooth K, whose denoiser is linear and known in closed form."""
    shape, count = (1, 12, 12), 40
    kernel = CircularBlur(GaussianBlur(0.8).kernel, shape)
    basis = torch.eye(144, dtype=torch.float64).view(-1, *shape)
    root = 0.4 * kernel.A(basis).flatten(1).T
    values, vectors = torch.linalg.eigh(root @ root.T)

    def denoiser(x_sigma, sigma):
        gain = values / (values + sigma[0] ** 2)
        return (0.5 + ((x_sigma - 0.5).flatten(1) @ vectors * gain) @ vectors.T).view_as(x_sigma)

    white = torch.randn(count, 144, generator=generator(1), dtype=torch.float64)
    x0 = (0.5 + white @ root.T).view(count, *shape)
    physics = Inpainting(0.5).draw(count, shape, generator(2))
    y = observe(physics, x0, 0.02, generator(3))
    samples = Latino(Denoiser(denoiser), LatinoSetting(8, 0.3, 0.02))(
        y, physics, 0.02, num_samples=8, generator=generator(4)
    )
    start = WarmStart(SmoothingStart())(y, physics, 0.02)[:, 0]
    error, error_of_start = ((x - x0).square().mean() for x in (samples.mean(1), start))
    assert error < 0.75 * error_of_start
    assert samples.std(1).mean() > 0.01


@each_family
def test_latino_draws_images_with_the_evaluations_it_claims(family):
    prior = tiny_prior()
    batches = []
    prior.unet.register_forward_hook(lambda module, inputs, _: batches.append(len(inputs[0])))
    latino = Latino(prior, LatinoSetting(num_levels=5))
    y, physics = observation(family)
    samples = latino(y, physics, 0.05, num_samples=3, generator=generator())
    assert samples.shape == (2, 3, *SHAPE)
    assert samples.min() >= 0
    assert samples.max() <= 1
    assert sum(batches) == 2 * 3 * 5
    assert torch.equal(latino(y, physics, 0.05, num_samples=3, generator=generator()), samples)
    assert not torch.allclose(samples[:, 0], samples[:, 1], atol=1e-2)
    latino.chunk_size = 4  # whatever the chunk, up to the rounding of other batches
    torch.testing.assert_close(latino(y, physics, 0.05, 3, generator()), samples, rtol=0, atol=1e-5)


# --- the search --------------------------------------------------------------------------------------------------


class Grey(Sampler):
    """Grey of a level."""

    def __init__(self, level):
        super().__init__()
        self.level = level

    def draw(self, observation, streams):
        return torch.full((len(observation), *SHAPE), self.level)


@pytest.fixture
def nine(monkeypatch):
    """DISTS is the distance to 0.9."""

    def far_from_nine(x, reference):
        return (x - 0.9).abs().flatten(1).mean(1)

    monkeypatch.setitem(scores.SCORES, "dists", lambda: distance_score("dists", far_from_nine))
    monkeypatch.setattr(scores, "check_weights", lambda net: None)


def test_the_search_returns_the_best_of_all_settings(nine):
    levels, done = (0.1, 0.3, 0.6, 0.8, 0.95), []
    validation = [torch.full((2, *SHAPE), 0.55), torch.full((1, *SHAPE), 0.7)]
    problem, forecast = Problem(GaussianBlur(), 0.05), Forecast(progress_bar(disable=True), 0)
    forecast.drawn = done.append
    best = best_settings(levels, Grey, problem, validation, ["psnr_mean", "dists"], 2, forecast)
    assert best == {"psnr_mean": 0.6, "dists": 0.95}
    assert sum(done) == 5 * 3 * 2
    with pytest.raises(ValueError, match="'residual' is no number to choose by; take one of psnr_mean, psnr_limit"):
        best_settings(levels, Grey, problem, validation, ["residual"], 2)


def test_the_search_is_that_of_evaluated_settings():
    grid = [LatinoSetting(2, first, 0.02, width) for first in (0.1, 0.4) for width in (0.5, 2.0)]
    prior, problem, validation = tiny_prior(), Problem(SuperResolution(), 0.05), [images(2), images(1, 5)]
    rows = [evaluate(Latino(prior, setting), validation, problem, num_samples=2) for setting in grid]
    found = best_settings(
        grid, lambda setting: Latino(prior, setting), problem, validation, ["psnr_mean", "ssim", "psnr"], 2
    )
    for key in ("psnr_mean", "ssim", "psnr"):
        values = [row[key] for row in rows]
        assert len(set(values)) == 4
        assert found[key] == grid[values.index(max(values))]
