"""Blurs whose boundaries are not circular."""

from typing import Any

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor
from torch.nn.functional import pad

from ud2m.physics.circular import CircularBlur, check_kernel
from ud2m.physics.immutable import Immutable
from ud2m.physics.iterative import ConjugateGradients
from ud2m.physics.separable import Separable

BOUNDARIES = ("circular", "valid", "zero")
RANK_ONE = 1e-10
"""How far, over the largest tap, a tap may lie off a b^T in a kernel whose rows count as multiples of each other."""


class BoundedBlur(ConjugateGradients, Immutable, LinearPhysics):
    """Convolution with known boundaries, computed as a circular one on a torus that is large enough.

    ``valid``: y holds the pixels whose kernel lies inside the image, as a camera sees a scene that goes on beyond its
    sensor: for a kernel of h x w taps y is h - 1 rows and w - 1 columns smaller than x. ``zero``: the image is black
    outside, and y has its size. The prox is solved by ``ConjugateGradients``.

    Args:
        kernel: [1 or B, 1 or C, h, w]; the centre is the pixel (h // 2, w // 2).
        image_shape: (C, H, W).
        boundary: ``valid`` or ``zero``.
        device: where the operator lives.

    Raises:
        ValueError: for another boundary; for kernels as ``CircularBlur``.
    """

    torus: CircularBlur

    def __init__(
        self, kernel: Tensor, image_shape: tuple[int, int, int], boundary: str, device: torch.device | str = "cpu"
    ):
        _check_boundary(boundary)
        check_kernel(kernel, image_shape)
        super().__init__(img_size=tuple(image_shape))
        self.img_size = tuple(image_shape)
        channels, height, width = image_shape
        rows, columns = kernel.shape[-2:]
        if boundary == "valid":
            self.margin = (0, 0)
            self.first = (rows - 1 - rows // 2, columns - 1 - columns // 2)
            self.size = (height - rows + 1, width - columns + 1)
        else:
            self.margin, self.first, self.size = (rows - 1, columns - 1), (0, 0), (height, width)
        torus = (channels, height + self.margin[0], width + self.margin[1])
        self.torus = CircularBlur(kernel, torus, device)

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return A x: [B, C, H, W] -> [B, C, H', W']."""
        self.update_parameters(**kwargs)
        self._check_size(x, self.img_size[1:])
        return self._window(self.torus.A(pad(x, (0, self.margin[1], 0, self.margin[0]))))

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return A^T y: [B, C, H', W'] -> [B, C, H, W]."""
        self.update_parameters(**kwargs)
        self._check_size(y, self.size)
        (top, left), (height, width) = self.first, self.torus.img_size[1:]
        spread = pad(y, (left, width - left - self.size[1], top, height - top - self.size[0]))
        return self.torus.A_adjoint(spread)[..., : self.img_size[1], : self.img_size[2]]

    def _window(self, x: Tensor) -> Tensor:
        (top, left), (height, width) = self.first, self.size
        return x[..., top : top + height, left : left + width]

    def _check_size(self, image: Tensor, size: tuple[int, ...]) -> None:
        if image.ndim != 4 or tuple(image.shape[-2:]) != tuple(size):
            raise ValueError(
                f"the operator was made for {self.img_size[1]}x{self.img_size[2]} pixels and takes "
                f"[B, C, {size[0]}, {size[1]}] here, got {list(image.shape)}"
            )


def bounded_blur(
    kernel: Tensor, image_shape: tuple[int, int, int], boundary: str, device: torch.device | str = "cpu"
) -> Separable | BoundedBlur:
    """Return the blur of ``BoundedBlur``, in closed form where one kernel a b^T serves all samples and channels.

    Boxes are such kernels, and Gaussians whose axes are those of the image. Columns and rows are then convolved one
    after the other, by matrices whose singular values give the prox without iterations (``Separable``).

    Args and errors: as for ``BoundedBlur``.
    """
    _check_boundary(boundary)
    check_kernel(kernel, image_shape)
    factors = _factors(kernel) if kernel.shape[:2] == (1, 1) else None
    if factors is None:
        return BoundedBlur(kernel, image_shape, boundary, device)
    down, across = (_convolution_matrix(t, n, boundary) for t, n in zip(factors, image_shape[1:], strict=True))
    return Separable(down, image_shape, device=device, across=across)


def _factors(kernel: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return a and b of a kernel [1, 1, h, w] = a b^T in float64, None where there are none.

    Then a is the column of the tap of largest modulus, and b its row over that tap: no decomposition is needed.
    """
    taps = kernel[0, 0].double().cpu()
    row, column = divmod(int(taps.abs().argmax()), taps.shape[1])
    largest = taps[row, column]
    if largest == 0:
        return None
    a, b = taps[:, column], taps[row] / largest
    if (taps - torch.outer(a, b)).abs().max() > RANK_ONE * largest.abs():
        return None
    return a, b


def _check_boundary(boundary: str) -> None:
    """Raise ValueError unless the boundary is ``valid`` or ``zero``."""
    if boundary not in BOUNDARIES[1:]:
        raise ValueError(f"boundary must be valid or zero here, got {boundary!r}; CircularBlur is circular")


def _convolution_matrix(taps: Tensor, side: int, boundary: str) -> Tensor:
    """Return the convolution of n numbers with k taps as a matrix: [n - k + 1, n], or [n, n] for ``zero``."""
    first, count = (len(taps) - 1, side - len(taps) + 1) if boundary == "valid" else (len(taps) // 2, side)
    lag = first + torch.arange(count).unsqueeze(1) - torch.arange(side)
    inside = (lag >= 0) & (lag < len(taps))
    return torch.where(inside, taps[lag.clamp(0, len(taps) - 1)], 0.0)
