"""What psi may depend on: numbers that describe the problem of each sample."""

from collections.abc import Callable

import torch
from torch import Tensor

from ud2m.physics import Observation
from ud2m.precision import full_precision

TYPICAL_SIGMA_Y = 0.02
"""Noise level of y, image units, at which the feature ``noise`` is 0."""


def noise(x_sigma: Tensor, sigma: Tensor, observation: Observation) -> Tensor:
    """Return log(sigma_y / 0.02) [B]."""
    return (observation.sigma_y / TYPICAL_SIGMA_Y).log()


def gain(x_sigma: Tensor, sigma: Tensor, observation: Observation) -> Tensor:
    """Return log(tr(A^T A) / n) [B], how much the operator keeps of an image: 0 for A = I, log 0.3 for 70 % missing."""
    return observation.mean_gain.clamp_min(1e-6).log()


def strength(x_sigma: Tensor, sigma: Tensor, observation: Observation) -> Tensor:
    """Return log(tr((A^T A)^2) / tr(A^T A)) [B], how strongly what is kept is seen: 0 for masks, log 1/2 for blurs."""
    return observation.kept_gain.clamp_min(1e-6).log()


def hidden(x_sigma: Tensor, sigma: Tensor, observation: Observation) -> Tensor:
    """Return (1 - g) s^4 [B] with g and s of ``gain`` and ``strength``: the share of pixels that a mask hides.

    It is below .1 for blurs and super-resolution, and 0 for A = I: a slope on it changes psi for masks alone.
    """
    return (1 - observation.mean_gain) * observation.kept_gain**4


def level(x_sigma: Tensor, sigma: Tensor, observation: Observation) -> Tensor:
    """Return log(sigma / (1 + sigma)) [B], the noise level of x_sigma against the range of an image."""
    return (sigma / (1 + sigma)).log()


FEATURES: dict[str, Callable[[Tensor, Tensor, Observation], Tensor]] = {
    "noise": noise,
    "gain": gain,
    "strength": strength,
    "hidden": hidden,
    "level": level,
}


def feature_values(names: tuple[str, ...], x_sigma: Tensor, sigma: Tensor, observation: Observation) -> Tensor:
    """Return the named features of each sample, [B, F]; no gradient passes."""
    if not names:
        return sigma.new_zeros(len(sigma), 0)
    with torch.no_grad(), full_precision(sigma.device):
        return torch.stack([FEATURES[name](x_sigma, sigma, observation).to(sigma) for name in names], 1)
