"""Operators that need no code of their own: denoising, luminance, and any linear operator of deepinv by name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepinv
import torch
from deepinv.physics import DecomposablePhysics, LinearPhysics
from torch import Tensor

from ud2m.images import LUMINANCE
from ud2m.physics.data_term import DataTerm
from ud2m.physics.family import FixedOperator
from ud2m.physics.immutable import Immutable
from ud2m.physics.inpainting import PixelMask
from ud2m.physics.iterative import ConjugateGradients
from ud2m.physics.measurement import image_shape
from ud2m.physics.rows import at_least_float32, per_sample
from ud2m.precision import full_precision
from ud2m.raster import read_numbers


class Denoising(FixedOperator):
    """y = x + sigma_y w: every pixel is seen, A = I."""

    def operator(self, image_shape: tuple[int, int, int], device: torch.device | str) -> PixelMask:
        """Return the identity, as a mask without holes."""
        return PixelMask(torch.ones(1, 1, *image_shape[1:]), image_shape, device)


class Colorization(FixedOperator):
    """y = the luminance of a colour image (``Luminance``)."""

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError for images that are not in colour."""
        super().check(image_shape)
        if image_shape[0] != 3:
            raise ValueError(f"colorization needs images with 3 channels, got {image_shape[0]}")

    def operator(self, image_shape: tuple[int, int, int], device: torch.device | str) -> "Luminance":
        """Return the operator; nothing about it is random."""
        return Luminance(image_shape, device)

    def image_shape(self, y_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return (3, H, W)."""
        return 3, y_shape[1], y_shape[2]

    def y_channels(self, channels: int) -> int:
        """Return 1."""
        return 1


class Luminance(Immutable, LinearPhysics):
    """A x = sum_c w_c x_c with the ``LUMINANCE`` weights: [B, 3, H, W] -> [B, 1, H, W].

    deepinv's ``Decolorize``, but for the prox: theirs drops what the luminance does not see.
    """

    weights: Tensor

    def __init__(self, image_shape: tuple[int, int, int], device: torch.device | str = "cpu"):
        super().__init__(img_size=tuple(image_shape))
        self.img_size = tuple(image_shape)
        self.register_buffer("weights", torch.tensor(LUMINANCE, dtype=torch.float64).float().view(1, 3, 1, 1))
        self.to(device)

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return the luminance of x."""
        self.update_parameters(**kwargs)
        self._check_size(x, 3)
        return (self.weights.to(x.dtype) * x).sum(1, keepdim=True)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return w_c y."""
        self.update_parameters(**kwargs)
        self._check_size(y, 1)
        return self.weights.to(y.dtype) * y

    def A_dagger(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return w_c y / |w|^2."""
        return self.A_adjoint(y, **kwargs) / self._power(y)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float, **kwargs: Any) -> Tensor:
        """Return argmin_u gamma |A u - y|^2 / 2 + |u - z|^2 / 2 = z + w (y - A z) / (|w|^2 + 1 / gamma)."""
        self.update_parameters(**kwargs)
        mean = z.to(at_least_float32(z, y))
        gain = 1 / (self._power(mean) + 1 / per_sample(gamma, mean))
        return (mean + self.A_adjoint(gain * (y.to(mean.dtype) - self.A(mean)))).to(z.dtype)

    def _power(self, like: Tensor) -> Tensor:
        return self.weights.to(at_least_float32(like)).square().sum()

    def _check_size(self, image: Tensor, channels: int) -> None:
        if tuple(image.shape[1:]) != (channels, *self.img_size[1:]):
            raise ValueError(
                f"expected [B, {channels}, {self.img_size[1]}, {self.img_size[2]}], got {list(image.shape)}"
            )


class DeepinvOperator(FixedOperator):
    """Any linear operator of ``deepinv.physics`` by its name, the same for all samples.

    The prox is solved by ``ConjugateGradients``, whatever the operator brings, so that it is right for all of them.

    Args:
        name: of a subclass of ``deepinv.physics.LinearPhysics`` in ``deepinv.physics``, e.g. ``Tomography``.
        parameters: keyword arguments of its constructor; a string that ends in ``.npy`` is replaced by the tensor in
            that file. The image's size is filled in where the constructor has ``img_size`` or ``img_width``.
        size: (C, H, W) of the images, when an observation made elsewhere is to be explained; only you know it.

    Raises:
        ValueError: for an unknown name, or parameters that the operator does not have.
        FileNotFoundError: for a missing file.
    """

    def __init__(self, name: str, parameters: Mapping[str, Any] | None = None, size: Sequence[int] | None = None):
        kind = getattr(deepinv.physics, name, None)
        if not (isinstance(kind, type) and issubclass(kind, LinearPhysics)):
            known = sorted(
                n for n, k in vars(deepinv.physics).items() if isinstance(k, type) and issubclass(k, LinearPhysics)
            )
            raise ValueError(f"deepinv.physics has no linear operator {name!r}; it has {', '.join(known)}")
        self.kind: type[LinearPhysics] = kind
        self.arguments = inspect.signature(kind).parameters
        self.parameters = {key: _value(value) for key, value in (parameters or {}).items()}
        unknown = sorted(self.parameters.keys() - self.arguments.keys())
        if unknown:
            names = ", ".join(n for n in self.arguments if n not in ("kwargs", "device"))
            raise ValueError(f"deepinv's {name} has no parameter {', '.join(unknown)}; it has {names}")
        self.size = None if size is None else (int(size[0]), int(size[1]), int(size[2]))

    def operator(self, image_shape: tuple[int, int, int], device: torch.device | str) -> "Adopted":
        """Return the operator for images of this shape.

        Raises:
            ValueError: when deepinv cannot build it, or it does not take these images.
        """
        sizes = {"img_size": tuple(image_shape), "img_width": image_shape[-1]}
        parameters: dict[str, Any] = {k: v for k, v in sizes.items() if k in self.arguments} | self.parameters
        # an operator whose precision is a parameter takes no other
        dtype = parameters.get("dtype", torch.get_default_dtype()) if "dtype" in self.arguments else None
        try:
            physics = self.kind(**parameters, device=device)
            y = physics.A(torch.zeros(1, *image_shape, device=device, dtype=dtype))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"deepinv's {self.kind.__name__} with {', '.join(self.parameters) or 'no parameters'} does not take "
                f"images {tuple(image_shape)}: {error}"
            ) from error
        return Adopted(physics, image_shape, tuple(y.shape[1:]), dtype)

    def image_shape(self, y_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return ``size``, or the shape of y when none was given."""
        return self.size or y_shape


class Adopted(ConjugateGradients, Immutable, LinearPhysics):
    """An operator of deepinv with the prox of ``ConjugateGradients``; no call changes its parameters.

    Computed in ``dtype`` or, when that is None, in the precision of the images, but not below float32: under a
    mixed-precision context its products would be rounded.
    """

    inner: LinearPhysics

    def __init__(
        self,
        inner: LinearPhysics,
        image_shape: tuple[int, int, int],
        y_shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
    ):
        super().__init__(img_size=tuple(image_shape))
        self.img_size, self.y_shape = image_shape, y_shape
        self.inner, self.dtype = inner, dtype

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return A x."""
        self.update_parameters(**kwargs)
        return self._product(self.inner.A, x, self.img_size)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return A^T y."""
        self.update_parameters(**kwargs)
        return self._product(self.inner.A_adjoint, y, self.y_shape)

    def _product(self, product: Callable[[Tensor], Tensor], x: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(x.shape[1:]) != shape:
            raise ValueError(f"the operator takes [B, {', '.join(map(str, shape))}] here, got {list(x.shape)}")
        with full_precision(x.device):
            return product(x.to(self.dtype or at_least_float32(x))).to(x.dtype)


@image_shape.register
def _(physics: Adopted, y: Tensor) -> tuple[int, int, int]:
    return physics.img_size


def adopt(physics: DataTerm, y: Tensor) -> DataTerm:
    """Return an operator whose prox deepinv would iterate as an ``Adopted`` one, and any other as it is.

    deepinv's iteration stops at 50 steps without a word, and its samples disturb each other when their weights differ.

    Args:
        physics: the operator of these observations.
        y: [B, ...].
    """
    if not isinstance(physics, LinearPhysics) or not isinstance(y, Tensor) or not _iterates(physics):
        return physics
    channels, height, width = physics.A_adjoint(y.to(at_least_float32(y))).shape[1:]
    return Adopted(physics, (channels, height, width), tuple(y.shape[1:]))


def _iterates(physics: LinearPhysics) -> bool:
    """Return whether the prox is one of deepinv's own but for those with singular values, which have closed forms."""
    whose = type(physics).prox_l2.__module__
    return whose.startswith("deepinv.") and not isinstance(physics, DecomposablePhysics)


def _value(value: Any) -> Any:
    if isinstance(value, str) and value.endswith(".npy"):
        return torch.from_numpy(read_numbers(Path(value), value)).float()
    return value
