"""The operators of the noise-free tables of DDRM and I2SB, down to what only their public code says.

Sources: github.com/bahjat-kawar/ddrm (``functions/svd_replacement.py``, ``runners/diffusion.py``), ddrm-jpeg
(``functions/jpeg_torch.py``) and github.com/NVlabs/I2SB (``corruption/``), read in 2026. They add no noise.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ud2m.numbers import is_whole
from ud2m.physics.family import FixedOperator
from ud2m.physics.jpeg import Jpeg, JpegCodec, levels
from ud2m.physics.jpeg_codec import padded
from ud2m.physics.separable import Separable
from ud2m.physics.super_resolution import keys_taps

ZERO = 3e-2
"""Singular values of the one-dimensional operators below this are set to 0."""

KERNELS: dict[str, tuple[float, ...]] = {
    "uniform": (1 / 9,) * 9,
    "gaussian": tuple(float(w) for w in torch.softmax(-(torch.arange(-2.0, 3.0, dtype=torch.float64) ** 2) / 200, 0)),
}
"""Taps: a box of nine, and a Gaussian of deviation 10 at five pixels."""


class DdrmBlur(FixedOperator):
    """``deblur_uni`` and ``deblur_gauss`` (I2SB: blur-uni, blur-gauss) for square images.

    A row of the one-dimensional matrix has the taps i - k//2 .. i + k//2 - 1 of k, so that the last one is lost: the
    blur shifts by half a pixel and darkens (sums of 8/9 and 0.80). Black lies outside. Small singular values become 0.

    With ``mixed`` (the default, as in their code for colour) the gains are dealt out in another order than the
    components they belong to: components are sorted by gain with the channels side by side, gains are sorted and
    repeated channel after channel, so component p of channel c gets the gain of rank (3 p + c) mod n^2.

    Args:
        kernel: "uniform" or "gaussian".
        mixed: False gives each component its own gain: the blur that was meant.

    Raises:
        ValueError: for another kernel, or images that are not square.
    """

    def __init__(self, kernel: str = "uniform", mixed: bool = True):
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
        self.taps, self.mixed = KERNELS[kernel], mixed

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError for images that are not square."""
        super().check(image_shape)
        check_square(image_shape)

    def operator(self, image_shape: tuple[int, int, int], device: torch.device | str) -> Separable:
        """Return the operator for images (C, n, n)."""
        channels, side, _ = image_shape

        def gains(product: Tensor) -> Tensor:
            if not self.mixed:
                return product.unsqueeze(0)
            ranked, order = product.flatten().sort(descending=True)
            dealt = torch.empty(channels, side**2, dtype=product.dtype)
            dealt[:, order] = ranked.repeat(channels).view(side**2, channels).T
            return dealt.view(channels, side, side)

        return Separable(blur_matrix(self.taps, side), image_shape, ZERO, gains, device)


class DdrmSuperResolution(FixedOperator):
    """``sr4x-bicubic``: a bicubic kernel (a = -1/2) of 4 ``factor`` taps on square images whose border is mirrored.

    ``sr4x-pool`` is the mean of each block, which ``SuperResolution`` has: ``physics.operator.filter=box``.

    Raises:
        ValueError: when the factor is below 2 or does not divide the sides, or images are not square.
    """

    def __init__(self, factor: int = 4):
        if not is_whole(factor) or factor < 2:
            raise ValueError(f"factor must be an integer of at least 2, got {factor}")
        self.factor = self.multiple = factor

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError for images that are not square, not divisible, or smaller than half the kernel."""
        super().check(image_shape)
        check_square(image_shape)
        if image_shape[1] % self.factor or image_shape[1] < 2 * self.factor:
            raise ValueError(
                f"the factor {self.factor} must divide the side of the image, which must be at least "
                f"{2 * self.factor}, got {image_shape[1]}"
            )

    def operator(self, image_shape: tuple[int, int, int], device: torch.device | str) -> Separable:
        """Return the operator for images (C, n, n)."""
        return Separable(bicubic_matrix(self.factor, image_shape[1]), image_shape, ZERO, device=device)

    def image_shape(self, y_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return (C, H, W) of the images."""
        return y_shape[0], y_shape[1] * self.factor, y_shape[2] * self.factor


class DdrmJpegCodec(JpegCodec):
    """An encoder that takes one chroma pixel of each group, not their mean, and rounds nothing but the coefficients."""

    ycbcr = ((0.299, 0.587, 0.114), (-0.1687, -0.3313, 0.5), (0.5, -0.4187, -0.0813))

    def encode(self, x: Tensor) -> list[Tensor]:
        """Return round(T x / q) of each component."""
        known = levels(padded(x.double(), *self.layout.full))
        return [(self.forward_component(known, i) / self.steps(i, known)).round() for i in range(self.layout.channels)]

    def reduced(self, plane: Tensor, component: int) -> Tensor:
        """Return every ``factors``-th pixel."""
        down, across = self.layout.of(component)
        return plane[..., ::down, ::across]

    def enlarged(self, plane: Tensor, component: int) -> Tensor:
        """Return the adjoint of ``reduced``: the pixels back in their places, 0 in the others."""
        down, across = self.layout.of(component)
        full = plane.new_zeros(*plane.shape[:-2], plane.shape[-2] * down, plane.shape[-1] * across)
        full[..., ::down, ::across] = plane
        return full

    def gain(self, component: int) -> float:
        """Return g_i with T_i T_i^T = g_i I."""
        down, across = self.layout.of(component)
        return super().gain(component) * down * across


class DdrmJpeg(Jpeg):
    """``jpeg-10``: no real encoder, see ``DdrmJpegCodec``.

    Raises:
        ValueError: for a quality factor out of range.
    """

    codec = DdrmJpegCodec

    def __init__(self, quality: int | Sequence[int] = 10):
        super().__init__(quality, "4:2:0")


def check_square(image_shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless images (C, H, W) are square."""
    if image_shape[1] != image_shape[2]:
        raise ValueError(
            f"this protocol's operators take square images, got {image_shape[1]}x{image_shape[2]}; crop it"
        )


def blur_matrix(taps: Sequence[float], side: int) -> Tensor:
    """Return the one-dimensional blur [n, n]: tap t of k at column row + t - k // 2, without the last tap."""
    matrix = torch.zeros(side, side, dtype=torch.float64)
    for t, weight in enumerate(taps[:-1] if len(taps) % 2 else taps):
        offset = t - len(taps) // 2
        matrix += weight * torch.diag(torch.ones(max(side - abs(offset), 0), dtype=torch.float64), offset)
    return matrix


def bicubic_matrix(factor: int, side: int) -> Tensor:
    """Return the one-dimensional bicubic decimation [n / factor, n]; the border is mirrored, edge pixel included."""
    taps = keys_taps(factor, 4 * factor)
    matrix = torch.zeros(side // factor, side, dtype=torch.float64)
    rows = torch.arange(side // factor).unsqueeze(1)
    columns = rows * factor + factor // 2 - 2 * factor + torch.arange(4 * factor)
    mirrored = torch.where(columns < 0, -1 - columns, columns)
    mirrored = torch.where(mirrored >= side, 2 * side - 1 - mirrored, mirrored)
    return matrix.index_put_((rows.expand_as(mirrored), mirrored), taps.expand(mirrored.shape), True)
