"""Blur and blur with decimation under circular boundaries: everything exact, in the Fourier domain."""

import math
from collections.abc import Callable
from typing import Any

import torch
from deepinv.physics import BlurFFT, Downsampling
from torch import Tensor
from torch.nn.functional import pad

from ud2m.numbers import is_whole
from ud2m.physics.data_term import Prox, prepared_prox
from ud2m.physics.immutable import Immutable
from ud2m.physics.rows import at_least_float32, per_sample

# A singular value below this fraction of the largest counts as zero in A_dagger (the figure is deepinv's).
RELATIVE_RANK_TOLERANCE = 1e-5
LARGEST_KERNEL = 4096
"""Pixels a side: as many as the sides of large pictures have; a kernel of numbers in float64 then takes 134 MB."""


class CircularFilter(Immutable):
    """A = S H: convolution with a kernel, then decimation S by ``factor`` (1: none), on a torus.

    With X, Y, H the spectra of x, y and the kernel: A is Y(k) = mean over the factor^2 aliases of H X, A^T
    is X = conj(H) Y with Y repeated over the aliases, and A A^T is diagonal, P(k) = mean over aliases of
    |H|^2 (Zhao et al., "Fast single image super-resolution using a new analytical solution for l2-l2
    problems", IEEE TIP 2016). The kernel is transformed once, at construction. Half precision is computed
    in float32 and cast back.

    The kernel's centre lies on the centre of each block of factor x factor pixels: A shifts nothing.
    """

    per_sample: tuple[str, ...] = ("spectrum",)
    spectrum: Tensor
    img_size: tuple[int, int, int]
    factor: int

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return A x: [B, C, H, W] -> [B, C, H / factor, W / factor]."""
        self.update_parameters(**kwargs)
        return self._image_of(self._measure(self._spectrum_of(x, 1)), self.factor, x.dtype)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return A^T y: [B, C, H / factor, W / factor] -> [B, C, H, W]."""
        self.update_parameters(**kwargs)
        return self._image_of(self._spread(self._spectrum_of(y, self.factor)), 1, y.dtype)

    def A_A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return A A^T y."""
        self.update_parameters(**kwargs)
        return self._image_of(self._power(y) * self._spectrum_of(y, self.factor), self.factor, y.dtype)

    def A_adjoint_A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return A^T A x."""
        self.update_parameters(**kwargs)
        return self._image_of(self._spread(self._measure(self._spectrum_of(x, 1))), 1, x.dtype)

    def A_dagger(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return A^T (A A^T)^+ y; singular values below 1e-5 of the largest count as 0."""
        self.update_parameters(**kwargs)
        power = self._power(y)
        kept = power > RELATIVE_RANK_TOLERANCE**2 * power.amax((-2, -1), keepdim=True)
        inverse = torch.where(kept, 1 / power, torch.zeros_like(power))
        return self._image_of(self._spread(inverse * self._spectrum_of(y, self.factor)), 1, y.dtype)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float, **kwargs: Any) -> Tensor:
        """Return argmin_u gamma |A u - y|^2 / 2 + |u - z|^2 / 2 = z + A^T (A A^T + I / gamma)^-1 (y - A z).

        This form subtracts no large numbers, unlike deepinv's gamma (A^T y + z / gamma - ...): as gamma
        grows, inf included, it tends to the projection of z on {u: A u = y}, in float32 too.

        Args:
            z: [B, C, H, W].
            y: [B, C, H / factor, W / factor].
            gamma: number or tensor of one element, or [B] or [B, 1, 1, 1]; receives a gradient.
            kwargs: parameters of the operator, as deepinv's ``update_parameters`` takes them.
        """
        self.update_parameters(**kwargs)
        dtype = at_least_float32(z, y)
        return self.prepared(y.to(dtype))(gamma)(z.to(dtype)).to(z.dtype)

    def prepared(self, y: Tensor) -> Prox:
        """Return ``prepared_prox`` for y in float32 or float64."""
        kernel, power, data = self._kernel_spectrum(y), self._power(y), self._spectrum_of(y, self.factor)
        back = kernel.conj().resolve_conj()

        def weighted(gamma: Tensor | float) -> Callable[[Tensor], Tensor]:
            weight = back * self._tiled(stable_gain(power, gamma, y))

            def solve(z: Tensor) -> Tensor:
                mismatch = data - self._folded(kernel * self._spectrum_of(z, 1))
                return z + self._image_of(weight * self._tiled(mismatch), 1, z.dtype)

            return solve

        return weighted

    def singular_values(self) -> Tensor:
        """Return sqrt(P) at all frequencies of y, [1 or B, 1 or C, H / factor, W / factor] in the order of ``fft2``."""
        return full_spectrum(self._power().clamp_min(0), self._size(self.factor)[1]).real.sqrt()

    def _set_kernel(self, kernel: Tensor, image_shape: tuple[int, int, int], factor: int) -> None:
        channels, height, width = image_shape
        self.img_size, self.factor = (channels, height, width), factor
        spectrum = kernel_spectrum(kernel, (height, width), factor)
        # real pairs: Module.to(dtype) drops the imaginary part of complex buffers
        self.register_buffer("spectrum", torch.view_as_real(spectrum))  # type: ignore[attr-defined]

    def _kernel_spectrum(self, *tensors: Tensor) -> Tensor:
        return torch.view_as_complex(self.spectrum.to(at_least_float32(*tensors)))

    def _power(self, *tensors: Tensor) -> Tensor:
        """Return P, the spectrum of A A^T, in the dtype to compute in."""
        return self._measure(self._kernel_spectrum(*tensors).conj()).real

    def _spectrum_of(self, image: Tensor, factor: int) -> Tensor:
        size = self._size(factor)
        if image.ndim != 4 or tuple(image.shape[-2:]) != size:
            raise ValueError(
                f"the operator was made for {self.img_size[-2]}x{self.img_size[-1]} pixels and takes "
                f"[B, C, {size[0]}, {size[1]}] here, got {list(image.shape)}"
            )
        return torch.fft.rfft2(image.to(at_least_float32(image)))

    def _image_of(self, spectrum: Tensor, factor: int, dtype: torch.dtype) -> Tensor:
        return torch.fft.irfft2(spectrum, s=self._size(factor)).to(dtype)

    def _size(self, factor: int) -> tuple[int, int]:
        return self.img_size[-2] // factor, self.img_size[-1] // factor

    def _measure(self, spectrum: Tensor) -> Tensor:
        """Return the spectrum of A x from that of x."""
        return self._folded(self._kernel_spectrum(spectrum.real) * spectrum)

    def _spread(self, spectrum: Tensor) -> Tensor:
        """Return the spectrum of A^T y from that of y."""
        return self._kernel_spectrum(spectrum.real).conj() * self._tiled(spectrum)

    def _folded(self, spectrum: Tensor) -> Tensor:
        return fold(spectrum, self.factor, self.img_size[-1])

    def _tiled(self, spectrum: Tensor) -> Tensor:
        return tile(spectrum, self.factor, self.img_size[-1])


@prepared_prox.register
def _(physics: CircularFilter, y: Tensor) -> Prox:
    return physics.prepared(y.to(at_least_float32(y)))


class CircularBlur(CircularFilter, BlurFFT):
    """Circular convolution with one kernel for all samples, or one per sample.

    deepinv's ``BlurFFT``, but for: images keep their dtype, half precision included; prox and
    pseudo-inverse in the stable form; no state; a kernel larger than the image is refused (deepinv crops it
    silently). Its singular values and vectors (``mask``, ``U``, ``V``) stay available to deepinv's
    algorithms.

    Args:
        kernel: [1 or B, 1 or C, h, w]; the centre is the pixel (h // 2, w // 2).
        image_shape: (C, H, W).
        device: where the operator lives.

    Raises:
        ValueError: for a kernel that is not finite, not of these dimensions, or larger than the image.
    """

    per_sample = ("spectrum", "filter", "mask", "angle")

    def __init__(self, kernel: Tensor, image_shape: tuple[int, int, int], device: torch.device | str = "cpu"):
        check_kernel(kernel, image_shape)
        super().__init__(img_size=tuple(image_shape), filter=kernel.float())
        self._set_kernel(kernel, image_shape, factor=1)
        self.to(device)

    def prepared(self, y: Tensor) -> Prox:
        """Return ``prepared_prox`` for y in float32 or float64: the spectrum of u is conj(H) G Y + (1 - |H|^2 G) Z.

        G = 1 / (|H|^2 + 1 / gamma). It is the general form, in which blurs need one pass over the spectrum of z.
        """
        kernel, power, data = self._kernel_spectrum(y), self._power(y), self._spectrum_of(y, 1)
        back = kernel.conj().resolve_conj()

        def weighted(gamma: Tensor | float) -> Callable[[Tensor], Tensor]:
            gain = stable_gain(power, gamma, y)
            from_y, kept = back * gain * data, (1 - power * gain).to(data.dtype)

            def solve(z: Tensor) -> Tensor:
                return self._image_of(torch.addcmul(from_y, kept, self._spectrum_of(z, 1)), 1, z.dtype)

            return solve

        return weighted


class CircularDownsampling(CircularFilter, Downsampling):
    """Circular convolution, then every ``factor``-th pixel.

    deepinv's ``Downsampling`` rewrites its buffers, the kernel's spectrum included, on every call; centres
    the kernel factor / 2 - 1 pixels off the blocks; has a prox that subtracts two numbers of size gamma, of
    which float32 keeps nothing when gamma is large; and finds A_dagger by iterations. All of this is
    replaced.

    Args:
        kernel: low-pass filter [1 or B, 1 or C, h, w], with h and w even exactly when the factor is.
        image_shape: (C, H, W), multiples of the factor.
        factor: at least 1.
        device: where the operator lives.

    Raises:
        ValueError: as ``CircularBlur``, and when kernel or image do not suit the factor.
    """

    def __init__(
        self,
        kernel: Tensor,
        image_shape: tuple[int, int, int],
        factor: int,
        device: torch.device | str = "cpu",
    ):
        check_kernel(kernel, image_shape)
        check_factor(factor, image_shape)
        if any((taps - factor) % 2 for taps in kernel.shape[-2:]):
            raise ValueError(
                f"a kernel of {kernel.shape[-2]}x{kernel.shape[-1]} taps cannot be centred on blocks of "
                f"{factor}x{factor} pixels: take an even number of taps exactly when the factor is even"
            )
        # filter=None: deepinv then makes no buffers of its own, which only its own methods would read
        super().__init__(img_size=tuple(image_shape), filter=None, factor=factor)
        self._set_kernel(kernel, image_shape, factor)
        self.to(device)


def check_kernel(kernel: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless the kernel is finite, [1 or B, 1 or C, h, w] and not larger than (C, H, W)."""
    if kernel.ndim != 4 or kernel.shape[1] not in (1, image_shape[0]):
        raise ValueError(f"a kernel must be [1 or B, 1 or {image_shape[0]}, h, w], got {list(kernel.shape)}")
    if not kernel.isfinite().all():
        raise ValueError("a kernel must be finite, got NaN or infinity")
    if kernel.shape[-2] > image_shape[-2] or kernel.shape[-1] > image_shape[-1]:
        raise ValueError(
            f"the kernel ({kernel.shape[-2]}x{kernel.shape[-1]} pixels) is larger than the image "
            f"({image_shape[-2]}x{image_shape[-1]}): take a larger image or a smaller kernel"
        )


def check_side(side: float) -> None:
    """Raise ValueError for a kernel of more than ``LARGEST_KERNEL`` pixels a side, before memory is asked for."""
    if side > LARGEST_KERNEL:
        raise ValueError(
            f"the kernel would have {side:.4g} pixels a side, and at most {LARGEST_KERNEL} are made: take a smaller "
            "width or factor"
        )


def check_factor(factor: int, image_shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless the factor is at least 1 and divides height and width of (C, H, W)."""
    if not is_whole(factor) or factor < 1:
        raise ValueError(f"factor must be an integer of at least 1, got {factor!r}")
    if image_shape[-2] % factor or image_shape[-1] % factor:
        raise ValueError(
            f"factor {factor} does not divide the image size {image_shape[-2]}x{image_shape[-1]}: "
            f"crop or pad the image to multiples of {factor}"
        )


def kernel_spectrum(kernel: Tensor, size: tuple[int, int], factor: int = 1) -> Tensor:
    """Return rfft2 of the kernel on the torus, centred on the pixels [0, factor)^2, as complex64.

    The transform is made in float64, so that small values are right to float32's *relative* precision.
    """
    taps = kernel.shape[-2:]
    padded = pad(kernel.double(), (0, size[1] - taps[1], 0, size[0] - taps[0]))
    centred = padded.roll([-((t + factor - 1) // 2) for t in taps], dims=(-2, -1))
    return torch.fft.rfft2(centred).to(torch.complex64)


def stable_gain(power: Tensor, gamma: Tensor | float, y: Tensor) -> Tensor:
    """Return 1 / (P + 1 / gamma), the weight of a mismatch; finite where the operator measures nothing and gamma = inf.

    There 0 times it is 0: nothing is corrected.
    """
    return 1 / (power + 1 / per_sample(gamma, y)).clamp_min(torch.finfo(power.dtype).tiny)


def full_spectrum(half: Tensor, width: int) -> Tensor:
    """Complete rfft2's half spectrum to fft2's, [..., H, W], by X(-k) = conj X(k)."""
    missing = width - half.shape[-1]
    mirrored = half[..., 1 : missing + 1].flip((-2, -1)).roll(1, -2).conj()
    return torch.cat([half, mirrored], dim=-1)


def fold(half: Tensor, factor: int, width: int) -> Tensor:
    """Return the half spectrum after keeping every factor-th pixel: the mean over the aliases.

    ``width``: W before decimation, which a half spectrum does not tell.
    """
    if factor == 1:
        return half
    rows = half.unflatten(-2, (factor, -1)).mean(-3)
    return full_spectrum(rows, width).unflatten(-1, (factor, -1))[..., : width // factor // 2 + 1].mean(-2)


def tile(half: Tensor, factor: int, width: int) -> Tensor:
    """Return the half spectrum after putting factor - 1 zeros after every pixel: the spectrum, repeated.

    ``width``: W with the zeros.
    """
    if factor == 1:
        return half
    full = full_spectrum(half, width // factor)
    columns = width // 2 + 1
    return full.repeat(1, 1, factor, math.ceil(columns / full.shape[-1]))[..., :columns]
