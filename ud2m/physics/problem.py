"""What is given, y with its operator and noise level, and the problem that it was drawn from."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ud2m.numbers import is_number
from ud2m.physics.adopted import Measured, adopt, joined
from ud2m.physics.checks import check_numbers, check_observation, check_range, warn_of_another_level
from ud2m.physics.data_term import DataTerm, Prox, prepared_prox
from ud2m.physics.family import OperatorFamily
from ud2m.physics.measurement import ROUNDING, image_shape, kept_gain, mean_gain, observe
from ud2m.physics.rows import select_samples


@dataclass(frozen=True, eq=False)
class Observation:
    """Observations y = A x0 + sigma_y w of a batch, all that is known of x0.

    Attributes:
        y: [B, ...], image units.
        physics: the operator A of this batch.
        sigma_y: noise levels [B] of the values of y, image units.
    """

    y: Tensor
    physics: DataTerm
    sigma_y: Tensor

    @classmethod
    def of(cls, y: Measured, physics: DataTerm, sigma_y: float | Tensor) -> "Observation":
        """Return the observation for a noise level that is one number, or [B].

        This is the door for what users bring: y and the operator's numbers are looked at, and an operator of deepinv is
        tried out (``adopt``).

        Args:
            y: [B, ...] in image units, float; half precision becomes float32, and deepinv's ``TensorList`` one tensor.
            physics: the operator.
            sigma_y: noise level.

        Raises:
            ValueError: for values that are no numbers of an observation, levels that are not positive and finite, or
                neither one nor as many as observations, and as ``adopt``.
        """
        check_numbers(physics)
        data = check_observation(joined(y))
        levels = torch.as_tensor(sigma_y, device=data.device, dtype=data.dtype).reshape(-1)
        if len(levels) not in (1, len(data)) or not (levels > 0).all() or not levels.isfinite().all():
            raise ValueError(
                f"sigma_y must be a positive noise level in image units (images lie in [0, 1]), one number or one per "
                f"observation ({len(data)}); got {levels.tolist()}"
            )
        warn_of_another_level(physics, levels)
        adopted = adopt(physics, data if isinstance(y, Tensor) else y)
        check_range(adopted, data, levels)
        return cls(data, adopted, levels.expand(len(data)))

    def __len__(self) -> int:
        return len(self.y)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of x0, or (C, T, H, W) of a video."""
        return image_shape(self.physics, self.y)

    @property
    def prox(self) -> Prox:
        """``prepared_prox`` of y: prepared once, unless gradients are to reach y."""
        return prepared_prox(self.physics, self.y) if self.y.requires_grad else self._prox

    @cached_property
    def mean_gain(self) -> Tensor:
        """``mean_gain`` of the operator, [B]."""
        return mean_gain(self.physics, self._image)

    @cached_property
    def kept_gain(self) -> Tensor:
        """``kept_gain`` of the operator, [B]."""
        return kept_gain(self.physics, self._image)

    @cached_property
    def _prox(self) -> Prox:
        return prepared_prox(self.physics, self.y)

    @property
    def _image(self) -> Tensor:
        return self.sigma_y.new_empty(1).expand(len(self), *self.image_shape)

    @property
    def is_video(self) -> bool:
        """Whether it is one of videos."""
        return len(self.image_shape) == 4

    def independent(self) -> "Observation":
        """Return the observation with the noise level that says as much of x0 if all noise is taken to be independent.

        Channels that are all equal, those of a grey picture in colour, are C copies of one measurement: of independent
        noise there are none. Together they have its precision, as C measurements with noise of sqrt(C) sigma_y: for a
        grey image sum_c |y_c - A x_c|^2 / (2 C sigma_y^2) is |y_1 - A x_1|^2 / (2 sigma_y^2).
        """
        if self.y.ndim < 3:
            return self
        same = (self.y - self.y[:, :1]).flatten(1).abs().amax(1) < ROUNDING
        return replace(self, sigma_y=self.sigma_y * torch.where(same, self.y.shape[1] ** 0.5, 1.0).to(self.sigma_y))

    def to(self, dtype: torch.dtype) -> "Observation":
        """Return the observations with other floats."""
        return Observation(self.y.to(dtype), self.physics, self.sigma_y.to(dtype))

    def rows(self, index: Tensor) -> "Observation":
        """Return the observations ``index`` (int64, may repeat)."""
        return Observation(self.y[index], select_samples(self.physics, index), self.sigma_y[index])


@dataclass(frozen=True)
class Problem:
    """An operator family with its noise level; image i always gets the operator and the noise of stream (seed, i).

    Args:
        operator: draws the operators.
        sigma_y: noise level that samplers are told, image units, > 0.
        seed: of operators and noise.
        noise: the level that observations have, where it is another, as 0 in noise-free protocols. None: ``sigma_y``.
        sigma_y_range: lowest and highest level of training, log-uniform per sample. None: always ``sigma_y``.

    Raises:
        ValueError: for levels that are not positive.
    """

    operator: OperatorFamily
    sigma_y: float
    seed: int = 0
    noise: float | None = None
    sigma_y_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not is_number(self.sigma_y) or not self.sigma_y > 0:
            raise ValueError(f"sigma_y must be a positive noise level in image units, got {self.sigma_y!r}")
        low, high = self.levels
        if not 0 < low <= high:
            raise ValueError(f"sigma_y_range must hold two positive noise levels that rise, got {[low, high]}")

    @property
    def levels(self) -> tuple[float, float]:
        """Lowest and highest noise level of training."""
        low, high = self.sigma_y_range or (self.sigma_y, self.sigma_y)
        return float(low), float(high)

    @property
    def true_noise(self) -> float:
        """The noise level that observations at ``sigma_y`` have."""
        return self.sigma_y if self.noise is None else self.noise

    def observe(self, x0: Tensor, first: int = 0) -> Observation:
        """Return observations of images x0 [B, C, H, W], which are numbers ``first``... of their set."""
        streams = [torch.Generator(x0.device).manual_seed(1_000_003 * self.seed + first + i) for i in range(len(x0))]
        return self.draw(x0, x0.new_full((len(x0),), float(self.sigma_y)), streams)

    def draw(self, x0: Tensor, sigma_y: Tensor, streams: list[torch.Generator]) -> Observation:
        """Draw an operator and noise for each image x0 [B, C, H, W], whose sampler is told sigma_y [B]."""
        shape: Any = tuple(x0.shape[1:])  # (C, T, H, W) for an operator on videos
        physics = self.operator.draw(len(x0), shape, streams, x0.device)
        y = observe(physics, x0, sigma_y if self.noise is None else self.noise, streams)
        return Observation(y, adopt(physics, y), sigma_y)

    def sampling_generator(self, first: int, device: torch.device | str = "cpu") -> torch.Generator:
        """Return the source of a sampler's own randomness for a batch that begins with image ``first``.

        It is far from the streams of ``observe``: else a sampler could draw the very noise that it has to remove (of a
        seed, generators on CPUs read 32 bits).
        """
        return torch.Generator(device).manual_seed(2**31 + 1_000_003 * self.seed + first)
