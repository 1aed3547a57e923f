"""Operators that need no code of their own: denoising, luminance, and any linear operator of deepinv by name."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepinv
import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from ud2m.images import LUMINANCE
from ud2m.physics.adopted import Adopted, adopt
from ud2m.physics.data_term import DataTerm
from ud2m.physics.family import FixedOperator
from ud2m.physics.immutable import Immutable
from ud2m.physics.inpainting import PixelMask
from ud2m.physics.measurement import image_shape
from ud2m.physics.rows import at_least_float32, per_sample
from ud2m.random import global_draws
from ud2m.raster import is_array, read_numbers


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

    It is tried out before it is used (``adopt``). Where its constructor draws random numbers, they are always the same.

    Args:
        name: of a subclass of ``deepinv.physics.LinearPhysics`` in ``deepinv.physics``, e.g. ``Tomography``.
        parameters: keyword arguments of its constructor; a string that ends in ``.npy`` is replaced by the tensor in
            that file, complex64 or float32. The image's size is filled in where the constructor has ``img_size`` or
            ``img_width``.
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
        self.arguments = tuple(inspect.signature(kind).parameters)
        self.parameters = {key: _value(value) for key, value in (parameters or {}).items()}
        unknown = sorted(self.parameters.keys() - set(self.arguments))
        if unknown:
            names = ", ".join(n for n in self.arguments if n not in ("kwargs", "device"))
            raise ValueError(f"deepinv's {name} has no parameter {', '.join(unknown)}; it has {names}")
        self.made: dict[tuple[tuple[int, ...], str], DataTerm] = {}
        self.size = None if size is None else (int(size[0]), int(size[1]), int(size[2]))

    def operator(self, image_shape: tuple[int, int, int], device: torch.device | str) -> DataTerm:
        """Return the operator for images of this shape.

        Raises:
            ValueError: when deepinv cannot build it, or it does not take these images.
        """
        key = (tuple(image_shape), str(device))
        if key not in self.made:
            made = self._adopted(image_shape, device)
            if isinstance(made, Adopted):
                made.recipe = partial(self.operator, image_shape, str(device))
            self.made = {key: made}  # the last one alone: training asks for it again
        return self.made[key]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"made": {}}

    def _adopted(self, image_shape: tuple[int, int, int], device: torch.device | str) -> DataTerm:
        sizes = {"img_size": tuple(image_shape), "img_width": image_shape[-1]}
        parameters: dict[str, Any] = {k: v for k, v in sizes.items() if k in self.arguments} | self.parameters
        # an operator whose precision is a parameter takes no other
        dtype = parameters.get("dtype", torch.get_default_dtype()) if "dtype" in self.arguments else None
        try:
            with global_draws(0, device):
                physics = self.kind(**parameters, device=device)
            return adopt(physics, physics.A(torch.zeros(1, *image_shape, device=device, dtype=dtype)))
        except Exception as error:  # whatever the constructor raises
            raise ValueError(
                f"deepinv's {self.kind.__name__} with {', '.join(self.parameters) or 'no parameters'} does not take "
                f"images {tuple(image_shape)}: {error}"
            ) from error

    def image_shape(self, y_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return ``size``, or the shape of y when none was given."""
        return self.size or y_shape

    def read_observation(
        self, path: str | Path, channels: int, device: torch.device | str
    ) -> tuple[Tensor, DataTerm] | None:
        """Return y from a ``.npy`` file that holds one observation, in whatever shape and range it has; else None.

        Complex values become two channels, as deepinv has them.

        Raises:
            ValueError: when it has another shape than observations of images of ``size``.
        """
        if not is_array(path):
            return None
        array = torch.from_numpy(read_numbers(Path(path), path))
        if not (array.is_floating_point() or array.is_complex()):
            raise ValueError(f"it holds {array.dtype} values; an observation has floats in image units")
        y = (torch.view_as_real(array).movedim(-1, 0) if array.is_complex() else array).float()[None].to(device)
        if self.size is None and y.ndim != 4:
            raise ValueError(
                f"an observation of shape {list(y.shape[1:])} does not say how large the image is: give "
                "physics.operator.size=[C,H,W]"
            )
        physics = self.draw(1, self.size or (y.shape[1], y.shape[2], y.shape[3]), device=device)
        expected = physics.A(torch.zeros(1, *image_shape(physics, y), device=device)).shape
        if y.shape != expected:
            raise ValueError(
                f"it holds an observation {list(y.shape[1:])}, the operator makes {list(expected[1:])}; "
                "give the size of the image with physics.operator.size=[C,H,W]"
            )
        return y, physics


def _value(value: Any) -> Any:
    if isinstance(value, str) and is_array(value):
        tensor = torch.from_numpy(read_numbers(Path(value), value))
        return tensor.to(torch.complex64 if tensor.is_complex() else torch.float32)
    return value
