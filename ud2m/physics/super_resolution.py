"""Super-resolution."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ud2m.numbers import is_whole
from ud2m.physics.circular import CircularDownsampling, check_factor, check_kernel, check_side
from ud2m.physics.family import FixedOperator


class SuperResolution(FixedOperator):
    """y = every factor-th pixel of h * x, with circular boundaries; pixel i of y is centred on its block.

    Pixel i of y averages around (i + 1/2) factor - 1/2, as antialiased resizing in PIL, Matlab and PyTorch
    does (equal to PyTorch's away from the border). Differs from deepinv's ``Downsampling``, whose centre
    lies factor / 2 - 1 pixels before, and whose bicubic taps lie between the pixels for odd factors too.

    Args:
        factor: integer >= 2 that divides height and width.
        filter: ``bicubic`` (Keys' cubic with a = -1/2, stretched by the factor: 4 factor taps, one fewer
            where the factor is odd), ``box`` (mean of each block) or ``gaussian``.
        width: standard deviation of the Gaussian in pixels of x; by default 0.4 factor, 1.6 for a factor of 4.

    Raises:
        ValueError: for another factor or filter, or a width that is not positive or not a Gaussian's.
    """

    def __init__(self, factor: int = 4, filter: str = "bicubic", width: float | None = None):
        if not is_whole(factor) or factor < 2:
            raise ValueError(f"factor must be an integer of at least 2, got {factor!r}")
        if filter not in FILTERS:
            raise ValueError(f"unknown filter {filter!r}; allowed: {', '.join(FILTERS)}")
        if width is not None and (filter != "gaussian" or not 0 < width < math.inf):
            raise ValueError(f"width must be positive, and belongs to filter=gaussian; got {width} for {filter!r}")
        check_side(max(4 * factor, 2 * 3.3 * (width or 0)))
        self.factor = self.multiple = int(factor)
        taps = gaussian_taps(factor, width or 0.4 * factor) if filter == "gaussian" else FILTERS[filter](factor)
        self.kernel = torch.outer(taps, taps)[None, None]

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError where the factor does not divide the image or the kernel is larger than it."""
        super().check(image_shape)
        check_factor(self.factor, image_shape)
        check_kernel(self.kernel, image_shape)

    def operator(self, image_shape: tuple[int, int, int], device: torch.device | str) -> CircularDownsampling:
        """Return the operator; nothing about it is random."""
        return CircularDownsampling(self.kernel, image_shape, self.factor, device)

    def image_shape(self, y_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return (C, H, W) of the image: ``factor`` times the size of y."""
        return y_shape[0], y_shape[1] * self.factor, y_shape[2] * self.factor


def bicubic_taps(factor: int) -> Tensor:
    """Return Keys' cubic convolution kernel (a = -1/2) at the pixels' distances to the block's centre."""
    return keys_taps(factor, 4 * factor - factor % 2)


def keys_taps(factor: int, taps: int) -> Tensor:
    """Return Keys' cubic (a = -1/2), stretched by ``factor``, at so many pixels around its centre; the sum is 1."""
    d = (torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2).abs() / factor
    inner, outer = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    weights = torch.where(d <= 1, inner, outer)
    return weights / weights.sum()


def box_taps(factor: int) -> Tensor:
    """Return the mean over a block."""
    return torch.full((factor,), 1 / factor, dtype=torch.float64)


def gaussian_taps(factor: int, width: float) -> Tensor:
    """Return a Gaussian at the pixels' distances to the block's centre, cut at 3.3 widths or later."""
    taps = 2 * math.ceil(3.3 * width) + factor % 2
    d = torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2
    weights = torch.exp(-0.5 * (d / width) ** 2)
    return weights / weights.sum()


FILTERS: dict[str, Callable[..., Tensor]] = {"bicubic": bicubic_taps, "box": box_taps, "gaussian": gaussian_taps}
