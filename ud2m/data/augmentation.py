"""Random changes of training crops, which show a network more than a few photographs hold."""

from dataclasses import dataclass, fields

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Turn crops and change their colours; each crop in its own way.

    Args:
        turns: probability of one of the 8 symmetries of the square, all equally likely.
        permutation: probability of a random order of the channels.
        saturation: s; the distance of the channels to their mean is multiplied by a factor in [1 - s, 1 + s].
        gamma: g; intensities x become x^exp(u), u in [-g, g].

    With the defaults nothing changes. Results stay in [0, 1].

    Raises:
        ValueError: for numbers out of range.
    """

    turns: float = 0.0
    permutation: float = 0.0
    saturation: float = 0.0
    gamma: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (0 <= value <= 1):
                raise ValueError(f"augment.{field.name} must lie in [0, 1], got {value}; 0 switches it off")

    def __call__(self, crop: Tensor, rng: np.random.Generator) -> Tensor:
        """Return a changed copy of a square crop [C, S, S] with values in [0, 1]."""
        if rng.random() < self.turns:
            crop = crop.rot90(int(rng.integers(4)), (1, 2))
            crop = crop.transpose(1, 2) if rng.random() < 0.5 else crop
        if rng.random() < self.permutation:
            crop = crop[rng.permutation(len(crop)).tolist()]
        if self.saturation:
            grey = crop.mean(0, keepdim=True)
            crop = (grey + (1 + self.saturation * rng.uniform(-1, 1)) * (crop - grey)).clamp(0, 1)
        if self.gamma:
            crop = crop ** float(np.exp(self.gamma * rng.uniform(-1, 1)))
        return crop.contiguous()
