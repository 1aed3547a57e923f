"""Families of blurs."""

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from deepinv.physics import LinearPhysics
from deepinv.physics.functional import gaussian_blur
from deepinv.physics.generator import MotionBlurGenerator
from torch import Tensor

from ud2m.numbers import is_whole
from ud2m.physics.boundary import BOUNDARIES, bounded_blur
from ud2m.physics.circular import CircularBlur, check_kernel, check_side
from ud2m.physics.family import OperatorFamily
from ud2m.random import Generators, rand
from ud2m.raster import is_array, read_numbers, read_picture

GREY = 2 / 255
"""How far the channels of a picture of a kernel may differ, as a share of white: JPEG rounds."""


class Blur(OperatorFamily):
    """y = h * x with a kernel h of h x w taps (``taps``), whose centre is the pixel (h // 2, w // 2).

    Args:
        boundary: ``circular`` (the image repeats; exact in the Fourier domain), ``valid`` (y is smaller than x by the
            kernel's size less one, as a camera sees a larger scene) or ``zero`` (black outside); the last two are
            solved in closed form where kernels allow it, and else by conjugate gradients (``bounded_blur``).

    Raises:
        ValueError: for another boundary.
    """

    taps: tuple[int, int]

    def __init__(self, boundary: str = "circular"):
        if boundary not in BOUNDARIES:
            raise ValueError(f"unknown boundary {boundary!r}; allowed: {', '.join(BOUNDARIES)}")
        self.boundary = boundary

    @abstractmethod
    def kernels(self, batch_size: int, generator: Generators = None) -> Tensor:
        """Return the kernels of a batch, [1 or B, 1 or C, h, w]."""

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError where the kernel is larger than the image."""
        super().check(image_shape)
        check_kernel(torch.ones(1, 1, *self.taps), image_shape)

    def draw(
        self,
        batch_size: int,
        image_shape: tuple[int, int, int],
        generator: Generators = None,
        device: torch.device | str = "cpu",
    ) -> LinearPhysics:
        """Return the blur of a batch."""
        self.check(image_shape)
        kernels = self.kernels(batch_size, generator)
        if self.boundary == "circular":
            return CircularBlur(kernels, image_shape, device)
        return bounded_blur(kernels, image_shape, self.boundary, device)

    def image_shape(self, y_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return (C, H, W) of the image: with ``valid`` boundaries larger than y."""
        if self.boundary != "valid":
            return y_shape
        return y_shape[0], y_shape[1] + self.taps[0] - 1, y_shape[2] + self.taps[1] - 1

    def of_scene(self) -> "Blur":
        """Return the same blur with ``valid`` boundaries where they are circular: no photograph is periodic."""
        if self.boundary != "circular":
            return self
        other = copy.copy(self)
        other.boundary = "valid"
        return other


class GaussianBlur(Blur):
    """Blur by a Gaussian kernel of sum 1.

    The kernel is sampled at the pixels and cut at 3.3 of the larger width or later (deepinv's rule: 13x13 taps for
    1.6).

    Args:
        width: standard deviation in pixels, > 0; below about 0.5 a sampled Gaussian is narrower than it says. Two
            numbers make it anisotropic: along the rotated horizontal and vertical axes.
        angle: rotation in degrees, counter-clockwise, of the first axis against the horizontal.
        boundary: see ``Blur``.

    Raises:
        ValueError: when a width is not a positive number.
    """

    def __init__(self, width: float | Sequence[float] = 1.6, angle: float = 0.0, boundary: str = "circular"):
        super().__init__(boundary)
        widths = [float(w) for w in (width if isinstance(width, Sequence) else [width, width])]
        if len(widths) != 2 or not all(0 < w < math.inf for w in widths):
            raise ValueError(f"width (standard deviation of the blur in pixels) must be positive, got {width}")
        check_side(2 * 3.3 * max(widths))
        self.width, self.angle = widths, angle
        self.kernel = gaussian_blur(sigma=(widths[1], widths[0]), angle=angle, dtype=torch.float64)  # rows first
        self.taps = (self.kernel.shape[-2], self.kernel.shape[-1])

    def kernels(self, batch_size: int, generator: Generators = None) -> Tensor:
        """Return the kernel; nothing about it is random."""
        return self.kernel


class RandomGaussianBlur(Blur):
    """Blur by an anisotropic Gaussian kernel, another one for every sample.

    Args:
        widths: lowest and highest standard deviation in pixels; both axes of a sample draw from them.
        boundary: see ``Blur``.

    Raises:
        ValueError: for widths that are not positive and rising.
    """

    random = True

    def __init__(self, widths: Sequence[float] = (0.5, 3.0), boundary: str = "circular"):
        super().__init__(boundary)
        low, high = widths
        if not 0 < low <= high < math.inf:
            raise ValueError(f"widths (lowest and highest, in pixels) must be positive and rise, got {list(widths)}")
        self.widths = (float(low), float(high))
        side = 2 * math.ceil(3.3 * high) + 1
        self.taps = (side, side)

    def kernels(self, batch_size: int, generator: Generators = None) -> Tensor:
        """Return B kernels."""
        uniform = rand((batch_size, 3), generator).double()
        widths = self.widths[0] + (self.widths[1] - self.widths[0]) * uniform[:, :2]
        return gaussian_blur(psf_size=self.taps, sigma=widths, angle=180 * uniform[:, 2], dtype=torch.float64)


class UniformBlur(Blur):
    """Blur by the mean over size x size pixels.

    Args:
        size: side of the box in pixels, at least 1.
        boundary: see ``Blur``.

    Raises:
        ValueError: for another size.
    """

    def __init__(self, size: int = 9, boundary: str = "circular"):
        super().__init__(boundary)
        if not is_whole(size) or size < 1:
            raise ValueError(f"size (side of the box in pixels) must be an integer of at least 1, got {size!r}")
        self.taps = (size, size)

    def kernels(self, batch_size: int, generator: Generators = None) -> Tensor:
        """Return the kernel; nothing about it is random."""
        return torch.full((1, 1, *self.taps), 1 / math.prod(self.taps), dtype=torch.float64)


class MotionBlur(Blur):
    """Blur along random trajectories of a shaking camera, another one for every sample.

    Both coordinates of a trajectory are draws of a Gaussian process (Schuler et al., "Learning to deblur", 2015), made
    by deepinv's ``MotionBlurGenerator``; the kernel is the time spent in each pixel, and its centroid its centre.

    Args:
        size: side of the kernel in pixels, at least 3.
        smoothness: length scale of the process (deepinv's ``l``); less makes trajectories more jagged.
        spread: standard deviation of the process, where the kernel's half side is 1; more makes them longer.
        boundary: see ``Blur``.

    Raises:
        ValueError: for numbers out of range.
    """

    random = True

    def __init__(self, size: int = 17, smoothness: float = 0.3, spread: float = 0.25, boundary: str = "circular"):
        super().__init__(boundary)
        if not is_whole(size) or size < 3:
            raise ValueError(f"size (side of the kernel in pixels) must be an integer of at least 3, got {size!r}")
        if not smoothness > 0 or not 0 < spread <= 1:
            raise ValueError(
                f"smoothness must be positive and spread inside (0, 1], got smoothness={smoothness}, spread={spread}"
            )
        self.taps, self.smoothness, self.spread = (size, size), smoothness, spread

    def kernels(self, batch_size: int, generator: Generators = None) -> Tensor:
        """Return B kernels."""
        sources = generator if isinstance(generator, Sequence) else [generator] * batch_size
        return torch.cat([self._kernel(source) for source in sources]).double()

    def _kernel(self, source: torch.Generator | None) -> Tensor:
        device = "cpu" if source is None else source.device
        make = MotionBlurGenerator(self.taps, rng=source, device=device, l=self.smoothness, sigma=self.spread)
        return make.step(1)["filter"].cpu()


class KernelFile(Blur):
    """Blur by the user's own kernel, for all samples.

    Args:
        path: an image file (its grey levels are the weights) or a ``.npy`` file with a matrix [h, w].
        normalise: divide by the sum. Images need it, since their levels are in units of their own; without it a kernel
            file must sum to 1 within 5 %.
        boundary: see ``Blur``.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no image and no matrix, not finite, or has a sum that no blur can have.
    """

    def __init__(self, path: str | Path, normalise: bool = True, boundary: str = "circular"):
        super().__init__(boundary)
        kernel = read_kernel(Path(path))
        total = kernel.sum().item()
        if not normalise and not abs(total - 1) <= 0.05:
            raise ValueError(f"the kernel {path} sums to {total:.4g}, a blur keeps brightness; set normalise=true")
        if not total > 1e-6 * kernel.abs().sum().item():
            raise ValueError(f"the kernel {path} sums to {total:.4g} and cannot be normalised; give positive weights")
        self.kernel = (kernel / total if normalise else kernel)[None, None]
        self.taps = (kernel.shape[0], kernel.shape[1])

    def kernels(self, batch_size: int, generator: Generators = None) -> Tensor:
        """Return the kernel; nothing about it is random."""
        return self.kernel


def read_kernel(path: Path) -> Tensor:
    """Return a kernel [h, w] in float64 from a ``.npy`` or an image file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it does not hold a finite matrix of numbers.
    """
    name = f"the kernel {path}"
    values = read_numbers(path, name) if is_array(path) else _grey(read_picture(path, name), name)
    if values.dtype.kind == "c":
        raise ValueError(f"{name} must hold real weights, got {values.dtype}; take the part that is meant")
    kernel = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
    while kernel.ndim > 2 and len(kernel) == 1:
        kernel = kernel[0]
    if kernel.ndim != 2:
        raise ValueError(f"{name} must be a matrix [h, w], got shape {list(values.shape)}")
    if not kernel.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return kernel


def _grey(levels: np.ndarray, name: str) -> np.ndarray:
    """Return the levels [h, w] of a grey picture, which may be stored as colours that differ by rounding."""
    first, others = levels[..., :1].astype(np.int64), levels.astype(np.int64)
    if np.abs(others - first).max() > GREY * np.iinfo(levels.dtype).max:
        raise ValueError(f"{name} is in colour, but the weights of a kernel are grey levels; save one channel of it")
    return levels[..., 0] if levels.shape[2] == 1 else levels.mean(-1)
