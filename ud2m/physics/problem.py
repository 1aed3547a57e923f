"""What is observed, and how: an operator family with its noise level."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ud2m.physics import DataTerm, OperatorFamily, observe


@dataclass(frozen=True)
class Problem:
    """An operator family with its noise level; image i always gets the operator and the noise of stream (seed, i).

    Args:
        sigma_y: noise level that methods are told, > 0.
        noise: the one that observations have, where it is another, as 0 in noise-free protocols. None: ``sigma_y``.
    """

    operator: OperatorFamily
    sigma_y: float
    seed: int = 0
    noise: float | None = None

    def observe(self, x0: Tensor, first: int = 0) -> tuple[Tensor, DataTerm]:
        """Return y and the operator for images x0 [B, C, H, W], which are numbers ``first``... of their set."""
        streams = [torch.Generator(x0.device).manual_seed(1_000_003 * self.seed + first + i) for i in range(len(x0))]
        physics = self.operator.draw(len(x0), (x0.shape[1], x0.shape[2], x0.shape[3]), streams, x0.device)
        return observe(physics, x0, self.sigma_y if self.noise is None else self.noise, streams), physics

    def sampling_generator(self, first: int, device: torch.device | str = "cpu") -> torch.Generator:
        """Return the source of a method's own randomness for a batch that begins with image ``first``.

        It is far from the streams of ``observe``: else a method could draw the very noise that it has to remove (of a
        seed, generators on CPUs read 32 bits).
        """
        return torch.Generator(device).manual_seed(2**31 + 1_000_003 * self.seed + first)
