"""Gaussian blur."""

import math

import torch
from deepinv.physics.functional import gaussian_blur

from ud2m.noise import Generators
from ud2m.physics.circular import CircularBlur, check_kernel
from ud2m.physics.family import OperatorFamily


class GaussianBlur(OperatorFamily):
    """y = h * x with a Gaussian kernel h of sum 1 and circular boundaries.

    The kernel is sampled at the pixels and cut at 3.3 widths or later (deepinv's rule: 13x13 taps for 1.6).

    Args:
        width: standard deviation in pixels, > 0; below about 0.5 a sampled Gaussian is narrower than it says.

    Raises:
        ValueError: when ``width`` is not a positive number.
    """

    def __init__(self, width: float = 1.6):
        if not 0 < width < math.inf:
            raise ValueError(f"width (standard deviation of the blur in pixels) must be positive, got {width}")
        self.width = width
        self.kernel = gaussian_blur(sigma=(width, width), dtype=torch.float64)

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError where the kernel is larger than the image."""
        super().check(image_shape)
        check_kernel(self.kernel, image_shape)

    def draw(
        self,
        batch_size: int,
        image_shape: tuple[int, int, int],
        generator: Generators = None,
        device: torch.device | str = "cpu",
    ) -> CircularBlur:
        """Return the blur; nothing about it is random."""
        self.check(image_shape)
        return CircularBlur(self.kernel, image_shape, device)
