"""What needs no training: A^dagger y, a warm start, and zero-shot LATINO."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ud2m.physics import Observation
from ud2m.random import randn_like
from ud2m.samplers.base import PriorSampler, Sampler
from ud2m.unfolded.prox import joint_prox
from ud2m.unfolded.warm_start import SmoothingStart, Start, start_from_y


class PseudoInverse(Sampler):
    """A^dagger y as every sample."""

    draws = False

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return A^dagger y."""
        return observation.physics.A_dagger(observation.y)


class WarmStart(Sampler):
    """The warm start by itself, without any network evaluation, as every sample.

    Args:
        start: makes it.
    """

    draws = False

    def __init__(self, start: Start):
        super().__init__()
        self.start = start

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return f(y)."""
        return start_from_y(self.start, observation)


@dataclass(frozen=True)
class LatinoSetting:
    """Levels tau_k that fall geometrically, and delta_k = (width tau_k)^2.

    Args:
        num_levels: n, and network evaluations.
        tau_first: tau_1, image units.
        tau_last: tau_n, image units.
        width: > 0.
    """

    num_levels: int = 8
    tau_first: float = 0.25
    tau_last: float = 0.02
    width: float = 1.0

    def levels(self) -> list[float]:
        """Return tau_1 .. tau_n in image units."""
        last = max(self.num_levels - 1, 1)
        return [self.tau_first ** (1 - k / last) * self.tau_last ** (k / last) for k in range(self.num_levels)]


class Latino(PriorSampler):
    """Zero-shot LATINO [LATINO, algorithm 1] with a frozen pixel-space prior.

    From the warm start, for each level: z = x + tau eps; x = denoiser(z, tau); x = prox of the data at x with delta.

    Args:
        prior: see ``PriorSampler``.
        setting: its levels.
        warm_start: where it begins; ``SmoothingStart`` unless given.
        options: of ``PriorSampler``.
    """

    def __init__(
        self,
        prior: nn.Module,
        setting: LatinoSetting | None = None,
        warm_start: Start | None = None,
        **options: Any,
    ):
        super().__init__(prior, **options)
        self.setting, self.start = setting or LatinoSetting(), warm_start or SmoothingStart()

    def draw(self, observation: Observation, streams: list[torch.Generator]) -> Tensor:
        """Return one sample for each row."""
        x = start_from_y(self.start, observation).clamp(0, 1)
        denoiser = self.denoiser(streams)
        for tau in self.setting.levels():
            x = denoiser(x + tau * randn_like(x, streams), torch.full_like(observation.sigma_y, tau))
            x = joint_prox(observation, x, float("inf"), (self.setting.width * tau) ** 2, 1.0)(x)
        return x
