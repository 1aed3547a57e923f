"""ADMM-TV against a quadratic program, VISION-XL against a second implementation."""

import math

import pytest
import torch
from operators import generator
from scipy.optimize import lsq_linear
from test_lvtino import observed
from torch.nn.functional import conv1d, pad
from video_priors import VP, GaussianPrior, IdentityPrior

from ud2m.bars import NetworkEvaluations
from ud2m.physics import Denoising, Observation, Problem, SpaceTime, SuperResolution, VideoOperator
from ud2m.samplers.latent_latino import AnnealedSteps
from ud2m.samplers.video_rivals import AdmmTv, FrameLatino, VisionXl
from ud2m.unfolded.total_variation import total_variation
from ud2m.unfolded.warm_start import PinvStart


@pytest.mark.slow
@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_admm_tv_in_one_dimension_is_a_quadratic_program(weight):
    """With H = A^T A / sigma_y^2 the dual is least squares within |p| <= weight, by scipy."""
    frames, sigma_y = 10, 0.1
    matrix = 0.7 * torch.eye(frames, dtype=torch.float64) + 0.3 * torch.eye(frames, dtype=torch.float64).roll(1, 0)
    physics = SpaceTime(matrix, Denoising().draw(1, (1, 1, 1)), (1, frames, 1, 1))
    y = torch.rand(1, 1, frames, 1, 1, generator=generator(), dtype=torch.float64)
    observation = Observation(y, physics, torch.full((1,), sigma_y, dtype=torch.float64))
    D, root = torch.eye(frames, dtype=torch.float64).diff(dim=0), torch.linalg.cholesky(matrix.T @ matrix / sigma_y**2)
    right = matrix.T @ y.flatten() / sigma_y**2
    inner = [torch.linalg.solve_triangular(root, v, upper=False) for v in (D.T, right.unsqueeze(1))]
    p = lsq_linear(inner[0].numpy(), inner[1][:, 0].numpy(), (-weight, weight), tol=1e-14).x
    expected = torch.cholesky_solve((right - D.T @ torch.from_numpy(p)).unsqueeze(1), root)[:, 0]
    found = AdmmTv(1e-9, weight, iterations=400).draw(observation, [])
    torch.testing.assert_close(found.flatten(), expected, rtol=0, atol=1e-5)


def test_admm_tv_lowers_its_objective_and_draws_nothing():
    x0 = torch.rand(2, 1, 4, 8, 8, generator=generator()) * 0.5
    observation = Problem(VideoOperator(SuperResolution(2, "box"), 2, 2), 0.05).observe(x0)

    def objective(x):
        data = (observation.physics.A(x) - observation.y).square().flatten(1).sum(1) / (2 * 0.05**2)
        return data + total_variation(x, 3.0, 3.0)

    sampler = AdmmTv(iterations=30)
    found = sampler(observation.y, observation.physics, 0.05)[:, 0]
    start = observation.physics.A_dagger(observation.y)
    assert (objective(found) < 0.8 * objective(start)).all()
    noise = 0.02 * torch.randn(found.shape, generator=generator(1))
    assert (objective(found) < objective(found + noise)).all()
    assert sampler.nfe() == 0
    with pytest.raises(ValueError, match="ADMM-TV restores videos"):
        sampler(torch.rand(1, 1, 4, 4), SuperResolution(2).draw(1, (1, 8, 8)), 0.05)


def test_vision_xl_is_a_second_implementation():
    prior, observation, times = GaussianPrior(False, 4, 4, seed=2), observed(count=1), (200, 121, 41)
    sampler = VisionXl(prior, times=times, eta=0.4, chunk_size=4)
    sampler.start, sampler.steps = PinvStart(), AnnealedSteps(1.3)
    found = sampler.draw(observation, [generator(5)])[0, 0].flatten(1)
    abar = (1 - torch.linspace(VP["beta_start"] ** 0.5, VP["beta_end"] ** 0.5, 1000).double() ** 2).cumprod(0)
    blocks = torch.kron(torch.eye(3), torch.ones(1, 2) / 2).double()
    pooling = torch.kron(torch.eye(2), torch.ones(1, 2) / 2).double()
    A, y, noise = torch.kron(blocks, torch.kron(pooling, pooling)), observation.y.flatten(), generator(5)

    def estimate(z, t):
        a, b = abar[t].sqrt(), (1 - abar[t]).sqrt()
        gain = a * prior.covariance @ torch.linalg.inv(a**2 * prior.covariance + b**2 * torch.eye(16))
        z0 = prior.mean + (z - a * prior.mean) @ gain.T
        return z0, (z - a * z0) / b

    def blurred(x, width):
        reach = math.ceil(3 * width)
        taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1).double() / width) ** 2)
        taps = (taps / taps.sum()).view(1, 1, -1)
        for _ in range(2):
            x = conv1d(pad(x.reshape(-1, 1, 4), (reach, reach), "reflect"), taps).view(-1, 4, 4).mT
        return x.reshape(-1, 16)

    def mixed(z0, eps, t):
        return abar[t].sqrt() * z0 + (1 - abar[t]).sqrt() * eps

    x = (torch.linalg.pinv(A) @ y).clamp(0, 1).view(6, 16)
    z = mixed(*estimate(mixed(*estimate(4 * (x[:1] - 0.5), 41), 121), 121), 200).expand(6, -1)
    for k, t in enumerate(times):
        z0, eps = estimate(z, t)
        u, delta = (0.5 + z0 / 4).clamp(0, 1).flatten(), float(1.3**2 * (1 - abar[t]) / 4)
        left = A.T @ A / 0.05**2 + torch.eye(96) / delta
        x = torch.linalg.solve(left, A.T @ y / 0.05**2 + u / delta).clamp(0, 1).view(6, 16)
        if k < 2:
            fresh = torch.randn(1, 4, 4, generator=noise, dtype=torch.float64).flatten()
            smooth = blurred(x, float((2 * (1 - abar[t])).sqrt()))
            z = mixed(4 * (smooth - 0.5), math.sqrt(1 - 0.16) * eps + 0.4 * fresh, times[k + 1])
    torch.testing.assert_close(found, x, rtol=0, atol=1e-6)


def test_vision_xl_counts_its_evaluations_and_refuses_videos():
    observation = observed(count=2, side=8)
    sampler = VisionXl(IdentityPrior(False))
    with NetworkEvaluations(sampler.networks) as counter:
        samples = sampler.sample(observation, 2)
    assert samples.shape == (2, 2, 1, 6, 8, 8)
    assert sampler.nfe() == 8
    assert counter.count == 4 * (8 * 6 + 7)
    with pytest.raises(ValueError, match="VISION-XL needs a pipeline of images"):
        VisionXl(IdentityPrior(True))
    with pytest.raises(ValueError, match="VISION-XL restores videos"):
        sampler(torch.rand(1, 1, 4, 4), SuperResolution(2).draw(1, (1, 8, 8)), 0.05)


def test_latino_by_frame_is_a_second_implementation_and_counts_passes():
    prior, observation, times = GaussianPrior(False, 4, 4, seed=2), observed(), (700, 200)
    sampler = FrameLatino(prior, times=times, steps=AnnealedSteps(1.3), chunk_size=4)
    sampler.start, noise = PinvStart(), [generator(k) for k in range(2)]
    found = sampler.draw(observation, [generator(k) for k in range(2)])
    abar = (1 - torch.linspace(VP["beta_start"] ** 0.5, VP["beta_end"] ** 0.5, 1000).double() ** 2).cumprod(0)
    x = observation.physics.A_dagger(observation.y).clamp(0, 1)
    for t in times:
        a, b, u = abar[t].sqrt(), (1 - abar[t]).sqrt(), torch.zeros_like(x)
        gain = a * prior.covariance @ torch.linalg.inv(a**2 * prior.covariance + b**2 * torch.eye(16))
        for row in range(2):
            eps = torch.randn(6, 1, 4, 4, generator=noise[row], dtype=torch.float64)
            for frame in range(6):
                z = a * 4 * (x[row, 0, frame].flatten() - 0.5) + b * eps[frame].flatten()
                u[row, 0, frame] = (0.5 + (prior.mean + gain @ (z - a * prior.mean)) / 4).clamp(0, 1).view(4, 4)
        gamma = float((1.3 * b / 2) ** 2) / 0.05**2
        x = observation.physics.prox_l2(u, observation.y, gamma).clamp(0, 1)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-6)
    with NetworkEvaluations(sampler.networks) as counter:
        sampler.sample(observation, 2)
    assert counter.count == 4 * sampler.evaluations_of(observation) == 4 * 2 * 6
    assert sampler.nfe() == 2
    with pytest.raises(ValueError, match="LATINO by frame needs a pipeline of images"):
        FrameLatino(IdentityPrior(True))


def test_frames_of_other_channels_than_a_prior_has_are_refused():
    physics = VideoOperator(SuperResolution(2, "box")).draw(1, (3, 4, 4, 4))
    with pytest.raises(ValueError, match="pipeline stub has frames of 1 channels and the clip 3"):
        FrameLatino(IdentityPrior(False)).check(physics)
