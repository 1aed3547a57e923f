"""Methods to compare with: the pseudo-inverse, the warm start alone and zero-shot LATINO."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ud2m.physics import DataTerm, image_shape
from ud2m.priors.store import weights_fingerprint
from ud2m.random import randn_like
from ud2m.samplers.base import noise_levels
from ud2m.samplers.ud2m import PosteriorSampler
from ud2m.unfolded.prox import joint_prox
from ud2m.unfolded.warm_start import SmoothingStart, Start, start_from_y


def pseudo_inverse(y: Tensor, physics: DataTerm, sigma_y: Any = None, num_samples: int = 1, **options: Any) -> Tensor:
    """Return A^dagger y as every sample, [B, S, C, H, W] clamped to [0, 1]."""
    return physics.A_dagger(y).clamp(0, 1).unsqueeze(1).repeat(1, num_samples, 1, 1, 1)


class WarmStart:
    """The warm start by itself, without any network evaluation, as every sample."""

    networks: tuple[nn.Module, ...] = ()

    def __init__(self, start: Start):
        self.start = start

    @torch.no_grad()
    def __call__(
        self, y: Tensor, physics: DataTerm, sigma_y: float | Tensor = 0.01, num_samples: int = 1, **options: Any
    ) -> Tensor:
        """Return f(y) [B, S, C, H, W] for observations y [B, ...]."""
        x = start_from_y(self.start, image_shape(physics, y), y, physics, noise_levels(sigma_y, y))
        return x.clamp(0, 1).unsqueeze(1).repeat(1, num_samples, 1, 1, 1)


@dataclass(frozen=True)
class LatinoSetting:
    """Zero-shot LATINO: levels fall geometrically from tau_first to tau_last, delta = (width tau)^2."""

    num_levels: int = 8
    tau_first: float = 0.25
    tau_last: float = 0.02
    width: float = 1.0

    def levels(self) -> list[float]:
        """Return tau_1 .. tau_n in image units."""
        last = max(self.num_levels - 1, 1)
        return [self.tau_first ** (1 - k / last) * self.tau_last ** (k / last) for k in range(self.num_levels)]

    def describe(self) -> str:
        """Return the setting in words for a table."""
        return f"{self.num_levels} levels {self.tau_first:g}..{self.tau_last:g}, delta = ({self.width:g} tau)^2"


class Latino:
    """Zero-shot LATINO [LATINO, algorithm 1] with a frozen pixel-space prior; a ``Method``.

    From the warm start, for each level: z = x + tau eps; x = denoiser(z, tau); x = prox of the data at x with delta.
    """

    def __init__(self, prior: nn.Module, setting: LatinoSetting, warm_start: Start | None = None):
        self.prior, self.setting = prior, setting
        self.networks = [prior]
        self.start = WarmStart(warm_start or SmoothingStart())
        self.nfe = setting.num_levels

    @torch.no_grad()
    def __call__(
        self,
        y: Tensor,
        physics: DataTerm,
        sigma_y: float | Tensor = 0.01,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Return samples [B, S, C, H, W] in [0, 1] for observations y [B, ...]."""
        noise = noise_levels(sigma_y, y)
        start = self.start(y, physics, noise)[:, 0]
        samples = [self._sample(start, y, physics, noise, generator) for _ in range(num_samples)]
        return torch.stack(samples, dim=1)

    def _sample(
        self, x: Tensor, y: Tensor, physics: DataTerm, sigma_y: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        for tau in self.setting.levels():
            level = torch.full_like(sigma_y, tau)
            x = self.prior(x + tau * randn_like(x, generator), level)
            x = joint_prox(physics, y, x, x, float("inf"), (self.setting.width * tau) ** 2, 1.0, sigma_y)
        return x.clamp(0, 1)


def latino_settings(num_levels: int = 8) -> Iterator[LatinoSetting]:
    """Yield the grid over which the best setting is searched on validation images."""
    grid = itertools.product((0.1, 0.2, 0.4), (0.01, 0.02, 0.04), (0.5, 1.0, 2.0))
    start = LatinoSetting(num_levels=num_levels)
    return (replace(start, tau_first=first, tau_last=last, width=width) for first, last, width in grid)


class PseudoInverse:
    """A^dagger y as every sample."""

    networks: tuple[nn.Module, ...] = ()

    def __call__(
        self, y: Tensor, physics: DataTerm, sigma_y: Any = None, num_samples: int = 1, **options: Any
    ) -> Tensor:
        """Return A^dagger y [B, S, C, H, W] clamped to [0, 1]."""
        return pseudo_inverse(y, physics, sigma_y, num_samples)


class Trained:
    """A trained model with chosen options of sampling.

    Args:
        model: name of a shipped model, export folder or hub id. options: of ``PosteriorSampler.__call__``; None is the
            model's default.

    Raises:
        FileNotFoundError, ValueError: as ``PosteriorSampler.from_pretrained``.
    """

    def __init__(
        self,
        model: str,
        num_steps: int | None = None,
        eta: float | str | None = None,
        symmetries: int | None = None,
        step_scale: float | None = None,
        chunk_size: int = 64,
        tile: int | None = 512,
        device: torch.device | str = "cpu",
    ):
        self.sampler = PosteriorSampler.from_pretrained(model, device=device)
        self.options = {
            "num_steps": num_steps,
            "eta": eta,
            "symmetries": symmetries,
            "step_scale": step_scale,
            "chunk_size": chunk_size,
            "tile": tile,
        }
        network = self.sampler.network
        self.networks = [network.denoiser, *([network.warm_start] if network.warm_start.evaluations else [])]

    @property
    def fingerprint(self) -> str:
        """Which model this is: a SHA-256 of all its weights, and its defaults."""
        config = self.sampler.config
        defaults = (
            f"{config.num_steps} {config.grid_power} {config.eta} {config.symmetries} {config.step_scale} "
            f"{self.sampler.network.spec}"
        )
        return f"{weights_fingerprint(self.sampler.network.state_dict())} {defaults}"

    def __call__(
        self,
        y: Tensor,
        physics: DataTerm,
        sigma_y: float | Tensor | None = None,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Return samples [B, S, C, H, W]."""
        return self.sampler(y, physics, sigma_y, num_samples, generator=generator, **(self.options | options))
