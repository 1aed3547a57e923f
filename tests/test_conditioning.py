"""Psi that depends on the problem: features by their definitions, equality with the plain network, gradients."""

import math

import pytest
import torch
from tiny import SIZE, SPECS, adapted, save_tiny_prior, tiny_prior

from ud2m.physics import (
    Denoising,
    GaussianBlur,
    Inpainting,
    Jpeg,
    MissingBoxes,
    Mixture,
    Observation,
    SuperResolution,
    UniformBlur,
    kept_gain,
    mean_gain,
    observe,
)
from ud2m.priors.prior import Prior
from ud2m.samplers.ud2m import PosteriorSampler, SamplerConfig
from ud2m.unfolded.conditioning import FEATURES, feature_values
from ud2m.unfolded.network import build_network

SHAPE = (3, SIZE, SIZE)
NAMES = ["noise", "gain", "strength", "hidden", "level"]


def network(conditioning=None, prior=None):
    spec = {"num_blocks": 2, "rule": SPECS["annealed"], "warm_start": SPECS["smoothing"]}
    return build_network(prior or tiny_prior(), spec | ({"conditioning": conditioning} if conditioning else {}))


def problem(family=GaussianBlur(1.0), sigma_y=(0.02, 0.1)):  # noqa: B008
    x0 = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    physics = family.draw(2, SHAPE, torch.Generator().manual_seed(1))
    levels = torch.tensor(sigma_y)
    return x0, torch.tensor([0.5, 5.0]), observe(physics, x0, levels), physics, levels


@pytest.mark.parametrize(
    ("family", "expected", "tolerance"),
    [
        (Denoising(), 1.0, 1e-6),
        (Inpainting(0.7), 0.3, 0.06),
        (SuperResolution(2, "box"), 1 / 16, 0.01),  # 1/4 as many values, each of a variance of 1/4
        (Jpeg(), 1.0, 0),
    ],
)
def test_the_gain_is_the_mean_of_the_squared_singular_values(family, expected, tolerance):
    gain = mean_gain(family.draw(2, (3, 32, 32), torch.Generator().manual_seed(0)), torch.zeros(2, 3, 32, 32))
    torch.testing.assert_close(gain, torch.full((2,), expected), atol=tolerance, rtol=0)


def test_the_gain_of_a_blur_is_the_sum_of_its_squared_taps():
    physics = GaussianBlur(1.6).draw(1, (3, 128, 128))
    x = torch.zeros(1, 3, 128, 128)
    x[..., 64, 64] = 1
    expected = physics.A(x).square().sum() / 3
    assert mean_gain(physics, x).item() == pytest.approx(expected.item(), rel=0.1)


@pytest.mark.parametrize(
    ("family", "tolerance"),
    [(Denoising(), 1e-6), (Inpainting(0.7), 1e-6), (GaussianBlur(1.0), 0.05), (SuperResolution(2), 0.02)],
)
def test_the_strength_is_that_of_the_dense_operator(family, tolerance):
    physics = family.draw(1, SHAPE, torch.Generator().manual_seed(0))
    units = torch.eye(math.prod(SHAPE)).view(-1, *SHAPE)
    # an operator that was drawn for one sample takes one sample
    matrix = torch.cat([physics.A(unit.unsqueeze(0)).flatten(1) for unit in units]).double()
    gram = matrix.T @ matrix  # A A^T, of the same traces
    expected = gram.square().sum() / gram.trace()
    value = kept_gain(physics, torch.zeros(1, *SHAPE)).double()
    torch.testing.assert_close(value, expected.expand(1), atol=tolerance, rtol=0)


def test_the_strength_of_a_jpeg_is_one():
    physics = Jpeg().draw(2, (3, 32, 32))
    assert kept_gain(physics, torch.zeros(2, 3, 32, 32)).tolist() == [1, 1]


def test_features_are_what_they_say():
    x, sigma, y, physics, sigma_y = problem(Mixture([Denoising(), Inpainting(0.5)]))
    observation = Observation(y, physics, sigma_y)
    features = feature_values(tuple(NAMES), x, sigma, observation)
    torch.testing.assert_close(features[:, 0], (sigma_y / 0.02).log())
    torch.testing.assert_close(features[:, 1], mean_gain(physics, x).log())
    torch.testing.assert_close(features[:, 2], kept_gain(physics, x).log())
    torch.testing.assert_close(features[:, 3], (1 - mean_gain(physics, x)) * kept_gain(physics, x) ** 4)
    torch.testing.assert_close(features[:, 4], torch.tensor([math.log(0.5 / 1.5), math.log(5 / 6)]))
    assert feature_values((), x, sigma, observation).shape == (2, 0)
    assert set(NAMES) == set(FEATURES)


@pytest.mark.parametrize(
    ("family", "lowest", "highest"),
    [
        (Inpainting(0.7), 0.64, 0.76),
        (MissingBoxes(0.12, 4), 0.05, 0.3),
        (Denoising(), 0.0, 1e-6),
        (GaussianBlur(0.6), 0.0, 0.1),
        (GaussianBlur(1.6), 0.0, 0.1),
        (UniformBlur(9), 0.0, 0.1),
        (SuperResolution(2), 0.0, 0.01),
        (SuperResolution(4), 0.0, 0.01),
        (Jpeg(), 0.0, 0.0),
    ],
)
def test_masks_alone_hide_pixels(family, lowest, highest):
    x0 = torch.full((2, 3, 64, 64), 0.5)
    physics = family.draw(2, (3, 64, 64), torch.Generator().manual_seed(0))
    observation = Observation(observe(physics, x0, 0.01), physics, torch.full((2,), 0.01))
    found = FEATURES["hidden"](x0, torch.ones(2), observation)
    assert found.min() >= lowest
    assert found.max() <= highest


def test_conditioned_psi_starts_as_the_plain_one_and_then_scales_with_the_features():
    x, sigma, y, physics, sigma_y = problem()
    prior = tiny_prior()
    plain, conditioned = network(prior=prior), network(NAMES, prior)
    observation = Observation(y, physics, sigma_y)
    arguments = (x, sigma, observation)
    one, other = (n(*arguments, torch.Generator().manual_seed(2)) for n in (plain, conditioned))
    torch.testing.assert_close(one, other)
    # Oracle: each sample alone, by a plain network with the factors that its features give.
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in conditioned.own_state().values():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
        streams = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        together = conditioned(*arguments, streams)
    for k in range(2):
        row = slice(k, k + 1)
        features = feature_values(tuple(NAMES), x, sigma, observation)[k]
        state = {
            name: value + features @ conditioned.own_state()[name.replace("log_", "slope_")]
            for name, value in conditioned.own_state().items()
            if "log_" in name
        }
        plain.load_own_state(state)
        with torch.no_grad():
            alone = plain(
                x[row], sigma[row], observation.rows(torch.tensor([k])), [torch.Generator().manual_seed(3 + k)]
            )
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-4)


def test_slopes_receive_gradients_and_are_exported(tmp_path):
    prior = adapted(Prior.from_pretrained(save_tiny_prior(tmp_path / "prior")))
    conditioned = network(["noise", "gain"], prior)
    x, sigma, y, physics, sigma_y = problem()
    conditioned(x, sigma, Observation(y, physics, sigma_y), torch.Generator().manual_seed(0)).square().sum().backward()
    slopes = {name: p for name, p in conditioned.named_parameters() if "slope_" in name}
    assert len(slopes) == 2 * 3 + 2
    assert all(p.grad.abs().min() > 0 for p in slopes.values())
    with torch.no_grad():
        for parameter in slopes.values():
            parameter += 0.3
    sampler = PosteriorSampler(conditioned, SamplerConfig())
    sampler.save_pretrained(tmp_path / "export")
    again = PosteriorSampler.from_pretrained(tmp_path / "export")
    one, other = (s(y, physics, 0.05, generator=torch.Generator().manual_seed(3)) for s in (sampler, again))
    torch.testing.assert_close(one, other)
    assert set(conditioned.psi()) == set(network(prior=tiny_prior()).psi())


def test_unknown_features_are_refused():
    with pytest.raises(ValueError, match=r"conditioned on \['weather'\]; choose from noise, gain, strength, hidden"):
        network(["weather"])
