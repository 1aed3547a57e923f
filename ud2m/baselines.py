"""Methods to compare with: the pseudo-inverse, the warm start alone and zero-shot LATINO."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor, nn

from ud2m.pipeline import PosteriorSampler, SamplerConfig, noise_levels
from ud2m.prior import Prior
from ud2m.unfolded import NOTHING_KNOWN, SmoothingStart, UnfoldedNetwork


def pseudo_inverse(
    y: Tensor, physics: LinearPhysics, sigma_y: Any = None, num_samples: int = 1, **options: Any
) -> Tensor:
    """Return A^dagger y as every sample, [B, S, C, H, W] clamped to [0, 1]."""
    return physics.A_dagger(y).clamp(0, 1).unsqueeze(1).repeat(1, num_samples, 1, 1, 1)


class WarmStart:
    """The warm start by itself, without any network evaluation, as every sample."""

    def __init__(self, start: nn.Module):
        self.start = start

    @torch.no_grad()
    def __call__(
        self, y: Tensor, physics: LinearPhysics, sigma_y: float | Tensor = 0.01, num_samples: int = 1, **options: Any
    ) -> Tensor:
        """Return f(y) [B, S, C, H, W] for observations y [B, ...]."""
        grey = torch.full_like(physics.A_adjoint(y), 0.5)
        nothing_known = torch.full((len(y),), NOTHING_KNOWN, device=y.device, dtype=y.dtype)
        x = self.start(grey, nothing_known, y, physics, noise_levels(sigma_y, y))
        return x.clamp(0, 1).unsqueeze(1).repeat(1, num_samples, 1, 1, 1)


@dataclass(frozen=True)
class LatinoSetting:
    """Zero-shot LATINO: levels fall geometrically from tau_first to tau_last, delta = (width tau)^2."""

    num_levels: int = 8
    tau_first: float = 0.25
    tau_last: float = 0.02
    width: float = 1.0

    def __call__(self, k: int, num_blocks: int, sigma: Tensor, sigma_y: Tensor) -> tuple[Tensor, Tensor]:
        """Return (delta_k, tau_k) [B], as a rule of ``UnfoldedNetwork``."""
        position = k / (num_blocks - 1) if num_blocks > 1 else 0.5
        tau = torch.full_like(sigma, self.tau_first ** (1 - position) * self.tau_last**position)
        return (self.width * tau) ** 2, tau

    def describe(self) -> str:
        """Return the setting in words for a table."""
        return f"{self.num_levels} levels {self.tau_first:g}..{self.tau_last:g}, delta = ({self.width:g} tau)^2"


def latino(prior: Prior, setting: LatinoSetting, warm_start: nn.Module | None = None) -> PosteriorSampler:
    """Return zero-shot LATINO [LATINO, algorithm 1] with the frozen prior, from the regularised warm start by default.

    It is an unfolded network of ``num_levels`` untrained modules, called once (N = 1) with an x_sigma so noisy that it
    says nothing.
    """
    network = UnfoldedNetwork(prior, setting.num_levels, setting, warm_start or SmoothingStart())
    return PosteriorSampler(network.eval(), prior, SamplerConfig(num_steps=1))


def latino_settings(num_levels: int = 8) -> Iterator[LatinoSetting]:
    """Yield the grid over which the best setting is searched on validation images."""
    grid = itertools.product((0.1, 0.2, 0.4), (0.01, 0.02, 0.04), (0.5, 1.0, 2.0))
    start = LatinoSetting(num_levels=num_levels)
    return (replace(start, tau_first=first, tau_last=last, width=width) for first, last, width in grid)
