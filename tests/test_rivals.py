"""Samplers of deepinv against exact posteriors and against deepinv by itself."""

import deepinv
import pytest
import torch
from torch import nn

from ud2m.physics import (
    Colorization,
    DdrmBlur,
    DdrmSuperResolution,
    Denoising,
    GaussianBlur,
    Inpainting,
    Jpeg,
    MotionBlur,
    Observation,
    SuperResolution,
    UniformBlur,
    observe,
)
from ud2m.priors.gaussian_mixture import GaussianMixture
from ud2m.samplers.base import seeds_from
from ud2m.samplers.deepinv import Ddrm, DeepinvDenoiser, DiffPir, Dps, Langevin, PnpFlow, decomposition

SHAPE = (1, 8, 8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def white(deviation=0.1):
    """Independent Gaussian pixels around 0.5."""
    return GaussianMixture(torch.ones(1), torch.full((1, *SHAPE), 0.5), deviation**2 * torch.eye(64)[None])


def smooth():
    """One Gaussian whose pixels are correlated over some distance."""
    line = torch.arange(8.0).double()
    kernel = torch.exp(-((line[:, None] - line) ** 2) / 8)
    return GaussianMixture(
        torch.ones(1), torch.full((1, *SHAPE), 0.5), (0.04 * torch.kron(kernel, kernel) + 1e-4 * torch.eye(64))[None]
    )


def problem(prior, family, sigma_y=0.05):
    x0 = prior.sample(1, generator(1)).float()
    physics = family.draw(1, tuple(x0.shape[1:]), generator(2))
    return observe(physics, x0, sigma_y, generator(3)), physics


def one_by_one(sample, seeds):
    """Samples of deepinv by itself, whose noise is torch's global one."""
    drawn = []
    for seed in seeds:
        torch.manual_seed(seed)
        drawn.append(sample().float().clamp(0, 1))
    return torch.cat(drawn)


class Recorder(nn.Module):
    """Keeps what a denoiser is asked."""

    def __init__(self):
        super().__init__()
        self.levels, self.batches = [], []

    def forward(self, x, sigma):
        self.levels.append(sigma)
        self.batches.append(len(x))
        return 0.9 * x


def test_the_adapter_gives_every_sample_its_level():
    denoiser = Recorder()
    for sigma in (0.3, torch.tensor(0.3), torch.tensor([[0.3]]), torch.full((2,), 0.3)):
        DeepinvDenoiser(denoiser)(torch.zeros(2, *SHAPE), sigma)
        torch.testing.assert_close(denoiser.levels[-1], torch.tensor([0.3, 0.3]))


# --- DDRM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    [
        GaussianBlur(0.8),
        Inpainting(0.5),
        Denoising(),
        DdrmBlur(),
        DdrmSuperResolution(2),
        SuperResolution(2),
        SuperResolution(4, "box"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_decompositions_are_those_of_the_operators(family, channels):
    physics = family.draw(1, (channels, 8, 8), generator())
    x = torch.rand(1, channels, 8, 8, generator=generator(1))
    parts = decomposition(physics)
    coefficients = parts.V_adjoint(x)
    torch.testing.assert_close(parts.V(coefficients), x, atol=1e-5, rtol=0)
    # U^T A x = gains V^T x
    torch.testing.assert_close(parts.U_adjoint(physics.A(x)), parts.gains.float() * coefficients, atol=1e-5, rtol=0)
    noise = parts.V_adjoint(torch.randn(2000, channels, 8, 8, generator=generator(2)))
    # what is divided by sqrt(2) inside deepinv: real coefficients of white noise have variance 1, complex ones 1/2
    share = noise.var(0)[parts.gains[0].expand(noise.shape[1:]) > 0].mean().item()
    assert share == pytest.approx(0.5 if parts.is_complex else 1.0, abs=0.1)
    if not parts.is_complex:  # deepinv takes the coefficients of a blur as it wants them
        # white noise of the coefficients, as DDRM adds it, is white noise of the image
        image = parts.V(torch.randn(4000, *coefficients.shape[1:], generator=generator(3))).flatten(1)
        torch.testing.assert_close(image.T.cov(), torch.eye(image.shape[1]), atol=0.12, rtol=0)


@pytest.mark.slow
def test_ddrm_draws_unseen_pixels_from_the_prior_and_deepinv_alone_too_narrowly():
    prior = white()
    y, physics = problem(prior, Inpainting(0.5), 0.02)
    unseen = physics.mask[0] == 0
    # eta = 0 is the probability flow, which is exact for a Gaussian prior where nothing is seen
    method = Ddrm(prior, num_steps=200, eta=0.0)
    samples = method(y, physics, 0.02, 200, generator=generator())[0]
    assert samples[:, unseen].std(0).mean() == pytest.approx(0.1, rel=0.05)
    assert samples[:, unseen].mean() == pytest.approx(0.5, abs=0.01)
    theirs = deepinv.physics.Inpainting(
        SHAPE, mask=physics.mask[0].float(), noise_model=deepinv.physics.GaussianNoise(0.02)
    )
    torch.manual_seed(0)
    sampler = deepinv.sampling.DDRM(DeepinvDenoiser(prior), method.levels, eta=0.0)
    plain = sampler(y.expand(200, *SHAPE).clone(), theirs)
    assert plain[:, unseen].std(0).mean() == pytest.approx(0.1 / 2**0.5, rel=0.05)


def test_ddrm_is_deepinvs_where_coefficients_are_complex():
    prior, family = smooth(), UniformBlur(3)
    y, physics = problem(prior, family)
    method = Ddrm(prior, num_steps=10)
    ours = method(y, physics, 0.05, 3, generator=generator(5))
    blur = deepinv.physics.BlurFFT(
        SHAPE, filter=family.kernels(1).float(), noise_model=deepinv.physics.GaussianNoise(0.05)
    )
    theirs = deepinv.sampling.DDRM(DeepinvDenoiser(prior), method.levels)
    expected = one_by_one(lambda: theirs(y.clone(), blur), seeds_from(generator(5), 3))
    torch.testing.assert_close(ours[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", [UniformBlur(3), Inpainting(0.5), DdrmSuperResolution(2), SuperResolution(2)])
def test_ddrm_comes_near_to_the_exact_posterior(family):
    prior = smooth()
    y, physics = problem(prior, family)
    posterior = prior.posterior(y, physics, 0.05)
    samples = Ddrm(prior, num_steps=50)(y, physics, 0.05, 200, generator=generator())[0]
    error = (samples.mean(0) - posterior.mean()).square().mean().sqrt()
    deviation = posterior.covariance().diagonal().mean().sqrt()
    assert error < deviation  # an approximation: its mean is right within the posterior's deviation
    assert 0.3 < (samples.var(0).mean().sqrt() / deviation).item() < 1.5
    far = (samples.mean(0) - prior.mean()).square().mean().sqrt()
    assert far > 3 * error  # and it is not the prior's mean


# --- DiffPIR and DPS ----------------------------------------------------------------------------------------------


def test_diffpir_is_deepinvs_and_comes_near_to_the_exact_posterior():
    prior, family = smooth(), UniformBlur(3)
    y, physics = problem(prior, family)
    posterior = prior.posterior(y, physics, 0.05)
    method = DiffPir(prior, num_steps=50, chunk_size=100)
    samples = method(y, physics, 0.05, 100, generator=generator(4))[0]
    theirs = deepinv.physics.BlurFFT(
        SHAPE, filter=family.kernels(1).float(), noise_model=deepinv.physics.GaussianNoise(0.05)
    )
    sampler = deepinv.sampling.DiffPIR(
        DeepinvDenoiser(prior), deepinv.optim.data_fidelity.L2(), sigma=0.05, max_iter=50, zeta=0.1, lambda_=7.0
    )
    expected = one_by_one(lambda: sampler(y, theirs), seeds_from(generator(4), 100)[:8])
    torch.testing.assert_close(samples[:8], expected, atol=1e-3, rtol=0)
    deviation = posterior.covariance().diagonal().mean().sqrt()
    assert (samples.mean(0) - posterior.mean()).square().mean().sqrt() < 0.6 * deviation
    assert 0.7 < (samples.var(0).mean().sqrt() / deviation).item() < 1.6


def test_dps_follows_the_data_the_more_the_larger_its_weight():
    prior = smooth()
    y, physics = problem(prior, UniformBlur(3))
    posterior = prior.posterior(y, physics, 0.05)

    def error(weight):
        samples = Dps(prior, num_steps=60, weight=weight)(y, physics, 0.05, 24, generator=generator())[0]
        return (samples.mean(0) - posterior.mean()).square().mean().sqrt().item()

    deviation = posterior.covariance().diagonal().mean().sqrt().item()
    assert error(50.0) < 1.2 * deviation < error(0.5)


def test_dps_is_deepinvs():
    prior = smooth()
    y, physics = problem(prior, UniformBlur(3))
    ours = Dps(prior, num_steps=10, weight=30.0)(y, physics, 0.05, 2, generator=generator(4))[0]
    sampler = deepinv.sampling.DPS(DeepinvDenoiser(prior), num_steps=10, weight=30.0)
    expected = one_by_one(lambda: sampler(y, physics), seeds_from(generator(4), 2))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


# --- PnP-Flow -----------------------------------------------------------------------------------------------------


def test_pnp_flow_moves_mean_and_covariance_of_a_gaussian_as_its_affine_steps_do():
    prior, steps, alpha, weight = smooth(), 12, 0.3, 1.5
    y, physics = problem(prior, UniformBlur(3))
    identity = torch.eye(64, dtype=torch.float64)
    A = physics.A(identity.view(64, *SHAPE).float()).flatten(1).double().T
    m, C, data = prior.mean().flatten().double(), prior.covariance().double(), y.flatten().double()
    norm = torch.linalg.matrix_norm(A, 2) ** 2
    mean, covariance = A.T @ data, torch.zeros_like(C)
    for n in range(1, steps + 1):
        t = n / (steps + 1)
        variance = ((1 - t) / (2 * t)) ** 2  # of the noise beside an image in [0, 1]
        step = weight * (1 - t) ** alpha / norm
        gain = C @ torch.linalg.inv(C + variance * identity)
        forward = identity - step * A.T @ A
        mean = m + gain @ (forward @ mean + step * A.T @ data - m)
        covariance = gain @ (forward @ covariance @ forward.T + variance * identity) @ gain.T
    torch.manual_seed(0)
    count = 4000
    method = PnpFlow(prior, steps, alpha, weight, chunk_size=count)
    with torch.no_grad():
        streams = [generator(seed) for seed in range(count)]
        drawn = method.draw(Observation.of(y, physics, 0.05).rows(torch.zeros(count, dtype=int)), streams)
    drawn = drawn.flatten(1).double()
    error = (drawn.mean(0) - mean) / (covariance.diagonal() / count).sqrt()
    assert error.abs().max() < 5
    assert error.square().mean() < 2
    assert (drawn.T.cov() - covariance).norm() < 0.15 * covariance.norm()


# --- what all share -----------------------------------------------------------------------------------------------


METHODS = [lambda prior, **o: Ddrm(prior, 5, **o), lambda prior, **o: DiffPir(prior, 5, **o)]
METHODS += [lambda prior, **o: Dps(prior, 5, **o), lambda prior, **o: PnpFlow(prior, 5, **o)]
each_method = pytest.mark.parametrize("make", METHODS)


@each_method
def test_every_observation_gets_its_own_mask_and_samples(make):
    prior = white(0.05)
    x0 = prior.sample(3, generator(1)).float()
    physics = Inpainting(0.3).draw(3, SHAPE, generator(2))
    y = observe(physics, x0, 0.01, generator(3))
    before = torch.get_rng_state()
    samples = make(prior)(y, physics, 0.01, 4, generator=generator())
    assert samples.shape == (3, 4, *SHAPE)
    assert torch.equal(torch.get_rng_state(), before)  # deepinv by itself draws from the global source
    assert 0 <= samples.min() < samples.max() <= 1
    assert torch.equal(samples, make(prior)(y, physics, 0.01, 4, generator=generator()))
    assert not torch.equal(samples, make(prior)(y, physics, 0.01, 4, generator=generator(1)))
    assert not torch.equal(samples[:, 0], samples[:, 1])


@pytest.mark.parametrize("make", [*METHODS, lambda prior, **o: Langevin(prior, 5, **o)])
@pytest.mark.parametrize("family", [Inpainting(0.3), MotionBlur(3), GaussianBlur(0.8, boundary="valid")])
def test_a_sample_does_not_depend_on_its_batch(make, family):
    """Operators, noise levels, noise and orientations are those of the row: one by one or together."""
    prior, levels = smooth(), torch.tensor([0.02, 0.05, 0.02])
    x0 = prior.sample(3, generator(1)).float()
    physics = family.draw(3, SHAPE, generator(2))
    y = observe(physics, x0, levels, generator(3))
    method = make(prior, symmetries=8)
    try:
        method.check(physics)
    except ValueError:
        pytest.skip("this method does not take the operator")
    together = method(y, physics, levels, 2, generator=generator(4))
    streams = [generator(seed) for seed in seeds_from(generator(4), 6)]
    observation = Observation.of(y, physics, levels)
    with torch.no_grad():
        for row, stream in enumerate(streams):
            alone = method.draw(observation.rows(torch.tensor([row // 2])), [stream]).clamp(0, 1)
            torch.testing.assert_close(together[row // 2, row % 2], alone[0], atol=1e-4, rtol=0)


@each_method
def test_the_network_sees_chunks_of_several_observations(make):
    y, physics = problem(white(), UniformBlur(3))
    denoiser = Recorder()
    make(denoiser, chunk_size=3)(y.expand(2, *SHAPE), physics, 0.05, 5, generator=generator())
    assert set(denoiser.batches) == {3, 1}


@each_method
def test_a_network_that_prefers_a_direction_is_seen_in_all_orientations(make):
    """A denoiser that brightens the left: with eight orientations no side is brighter, with one the left is."""
    tilt = torch.linspace(0.1, -0.1, 8).expand(1, 8, 8)

    class Tilted(nn.Module):
        def forward(self, x, sigma):
            return 0.5 + 0.2 * (x - 0.5) + tilt

    y, physics = torch.full((1, *SHAPE), 0.5), Denoising().draw(1, SHAPE)

    def slope(**options):
        mean = make(Tilted(), **options)(y, physics, 0.3, 200, generator=generator()).mean((0, 1, 2))
        return (mean[:, :4].mean() - mean[:, 4:].mean()).item()

    assert slope() > 0.04
    assert abs(slope(symmetries=8)) < 0.25 * slope()
    with pytest.raises(ValueError, match="symmetries must be 1"):
        make(Tilted(), symmetries=3)


@pytest.mark.parametrize(
    ("method", "family", "words"),
    [
        (Ddrm, Colorization(), "Ddrm cannot take the operator Luminance; it takes .* blur, super-resolution, masks"),
        (Ddrm, GaussianBlur((0.6, 1.2), 30, "valid"), "Ddrm cannot take the operator BoundedBlur"),
        (DiffPir, Jpeg(), "DiffPir cannot take the operator JpegCodec; it takes every linear operator"),
        (Dps, Jpeg(), "Dps cannot take the operator JpegCodec"),
        (PnpFlow, Jpeg(), "PnpFlow cannot take the operator JpegCodec"),
    ],
)
def test_operators_that_cannot_be_taken_are_named_with_those_that_can(method, family, words):
    physics = family.draw(1, (3, 16, 16), generator())
    with pytest.raises(ValueError, match=words):
        method(Recorder()).check(physics)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Ddrm(white(), 1), "num_steps of at least 2, got 1"),
        (lambda: Ddrm(white(), eta=2), "eta and etab in"),
        (lambda: DiffPir(white(), zeta=-1), "zeta in"),
        (lambda: DiffPir(white(), num_steps=0), "num_steps of DiffPIR"),
        (lambda: Dps(white(), weight=0), "positive weight"),
        (lambda: PnpFlow(white(), weight=2.0), r"a weight in \(0, 2\)"),
        (lambda: PnpFlow(white(), num_steps=0), "num_steps of PnP-Flow"),
        (lambda: Dps(white(), chunk_size=0), "chunk_size"),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
