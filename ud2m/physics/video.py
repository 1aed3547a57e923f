"""Operators on videos [B, C, T, H, W]: a matrix over frames times any operator on images, with an exact prox."""

from collections.abc import Callable
from typing import Any

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from ud2m.numbers import is_whole
from ud2m.physics.circular import RELATIVE_RANK_TOLERANCE
from ud2m.physics.data_term import DataTerm, Prox, prepared_prox
from ud2m.physics.family import OperatorFamily
from ud2m.physics.immutable import Immutable
from ud2m.physics.measurement import estimate_sigma_y, image_shape, measured
from ud2m.physics.rows import at_least_float32, per_sample, select_samples, with_tensors
from ud2m.random import Generators

Linear = Callable[[Any, Tensor], Tensor]


class SpaceTime(Immutable, LinearPhysics):
    """A = P (x) S: [B, C, T, H, W] -> [B, c, T', h, w], P [T', T] over frames and S on each frame.

    With P = U diag(s) V^T the problem falls into one for each mode j of V: its image sum_t V_tj x_t is seen through
    s_j S. So every spatial operator's own prox gives that of A, as exact as it is; modes are folded into the batch.

    Args:
        matrix: P, of finite numbers.
        spatial: S of this package, or adopted; one for each clip, shared by its frames.
        image_shape: (C, T, H, W).
        device: where the operator lives.

    Raises:
        ValueError: for a matrix that is not finite, not [T', T], or 0.
    """

    matrix: Tensor
    left: Tensor
    values: Tensor
    right: Tensor
    spatial: Any

    def __init__(
        self, matrix: Tensor, spatial: DataTerm, image_shape: tuple[int, ...], device: torch.device | str = "cpu"
    ):
        if matrix.ndim != 2 or matrix.shape[1] != image_shape[1] or not matrix.isfinite().all() or not matrix.any():
            raise ValueError(
                f"a matrix over {image_shape[1]} frames must be finite, not 0, and [T', {image_shape[1]}]; got "
                f"{list(matrix.shape)}"
            )
        super().__init__(img_size=tuple(image_shape))
        self.img_size, self.spatial = tuple(image_shape), spatial
        u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        kept = s > max(matrix.shape) * torch.finfo(s.dtype).eps * s[0]  # the others are 0 up to rounding
        parts = {"matrix": matrix.double(), "left": u[:, kept], "values": s[kept], "right": vt[kept].T}
        for name, value in parts.items():
            self.register_buffer(name, value.contiguous())
        self.to(device)

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return A x: [B, C, T, H, W] -> [B, c, T', h, w]."""
        self.update_parameters(**kwargs)
        return self._frame_by_frame(lambda S, frames: S.A(frames), self._mixed(self.matrix, x)).to(x.dtype)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return A^T y: [B, c, T', h, w] -> [B, C, T, H, W]."""
        self.update_parameters(**kwargs)
        return self._back(self.matrix.T, lambda S, frames: S.A_adjoint(frames), y)

    def A_dagger(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return P^dagger S^dagger y; singular values of P below 1e-5 of the largest count as 0, as those of S."""
        self.update_parameters(**kwargs)
        kept = self.values > RELATIVE_RANK_TOLERANCE * self.values.max()
        inverse = (self.right[:, kept] / self.values[kept]) @ self.left[:, kept].T
        return self._back(inverse, lambda S, frames: S.A_dagger(frames), y)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float, **kwargs: Any) -> Tensor:
        """Return argmin_u gamma |A u - y|^2 / 2 + |u - z|^2 / 2.

        Mode j of u is argmin gamma s_j^2 |S u_j - y_j / s_j|^2 / 2 + |u_j - z_j|^2 / 2, y_j = sum_t U_tj y_t; what no
        mode sees is that of z.

        Args:
            z: [B, C, T, H, W].
            y: [B, c, T', h, w].
            gamma: number or tensor of one element, or [B] or [B, 1, ...]; receives a gradient.
            kwargs: parameters of the operator, as deepinv's ``update_parameters`` takes them.
        """
        self.update_parameters(**kwargs)
        dtype = at_least_float32(z, y)
        return self.prepared(y.to(dtype))(gamma)(z.to(dtype)).to(z.dtype)

    def prepared(self, y: Tensor) -> Prox:
        """Return ``prepared_prox`` for y in float32 or float64."""
        onto = (self.left / self.values).T
        solver = prepared_prox(self._repeated(len(y), len(onto)), _folded(self._mixed(onto, y)))
        squares = self.values.square().to(y.dtype)

        def weighted(gamma: Tensor | float) -> Callable[[Tensor], Tensor]:
            weights = per_sample(gamma, y).reshape(-1, 1).expand(len(y), 1) * squares
            solve = solver(weights.flatten())

            def solved(z: Tensor) -> Tensor:
                modes = self._mixed(self.right.T, z)
                moved = _unfolded(solve(_folded(modes)), len(z)) - modes
                return z + self._mixed(self.right, moved)

            return solved

        return weighted

    def _mixed(self, matrix: Tensor, x: Tensor) -> Tensor:
        """Return sum_t M_jt x_t, computed in float32 at least."""
        if x.ndim != 5 or x.shape[2] != matrix.shape[1]:
            raise ValueError(f"the operator takes [B, C, {matrix.shape[1]}, h, w] here, got {list(x.shape)}")
        dtype = at_least_float32(x)
        return torch.einsum("jt,bcthw->bcjhw", matrix.to(dtype), x.to(dtype))

    def _back(self, matrix: Tensor, product: Linear, y: Tensor) -> Tensor:
        if y.ndim != 5 or y.shape[2] != len(self.matrix):
            raise ValueError(f"the operator takes [B, c, {len(self.matrix)}, h, w] here, got {list(y.shape)}")
        return self._mixed(matrix, self._frame_by_frame(product, y.to(at_least_float32(y)))).to(y.dtype)

    def _frame_by_frame(self, product: Linear, x: Tensor) -> Tensor:
        return _unfolded(product(self._repeated(len(x), x.shape[2]), _folded(x)), len(x))

    def _repeated(self, count: int, frames: int) -> Any:
        """Return S for the frames of ``count`` clips, one after the other."""
        return select_samples(self.spatial, torch.arange(count).repeat_interleave(frames))


def _folded(x: Tensor) -> Tensor:
    """Return [B T, C, H, W] from [B, C, T, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def _unfolded(frames: Tensor, count: int) -> Tensor:
    """Return [B, C, T, H, W] from [B T, C, H, W]."""
    return frames.unflatten(0, (count, -1)).transpose(1, 2)


@prepared_prox.register
def _(physics: SpaceTime, y: Tensor) -> Prox:
    return physics.prepared(y.to(at_least_float32(y)))


@select_samples.register
def _(physics: SpaceTime, index: Tensor) -> SpaceTime:
    selected = with_tensors(physics, lambda name, tensor: tensor)
    selected.spatial = select_samples(physics.spatial, index)
    return selected


@image_shape.register
def _(physics: SpaceTime, y: Tensor) -> tuple[int, ...]:
    return physics.img_size


@measured.register
def _(physics: SpaceTime, y: Tensor) -> Tensor:
    mask = measured(physics.spatial, y[:, :, 0])
    return mask.unsqueeze(2) if mask.ndim == 4 else mask


@estimate_sigma_y.register
def _(physics: SpaceTime, y: Tensor) -> Tensor:
    return estimate_sigma_y(physics._repeated(len(y), y.shape[2]), _folded(y)).view(len(y), -1).mean(1)


class VideoOperator(OperatorFamily):
    """y = the frames of a slow shutter, each seen through an operator on images: ``SpaceTime``.

    Frame j of y is the mean of ``exposure`` frames from the first of the block [j stride, (j + 1) stride) on, or around
    the block where they are more; the first and the last frame of a clip are repeated where a mean goes beyond it. So
    exposure = stride is temporal super-resolution, stride = 1 a blur in time, exposure = 1 drops frames.

    Args:
        space: draws the operator on images, one for each clip.
        exposure: frames of a mean.
        stride: frames of x for one of y.

    Raises:
        ValueError: for counts below 1.
    """

    video = True

    def __init__(self, space: OperatorFamily, exposure: int = 1, stride: int = 1):
        for name, value in {"exposure": exposure, "stride": stride}.items():
            if not is_whole(value) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        self.space, self.exposure, self.stride = space, exposure, stride
        self.random, self.multiple = space.random, space.multiple

    def check(self, image_shape: tuple[int, ...]) -> None:
        """Raise ValueError for what is no video, has fewer frames than ``stride``, or images that are not taken."""
        if len(image_shape) != 4 or min(image_shape) < 1:
            raise ValueError(f"this operator is for videos (C, T, H, W), got {tuple(image_shape)}")
        channels, frames, height, width = image_shape
        if frames < self.stride:
            raise ValueError(
                f"the clip has {frames} frames and the operator makes one of {self.stride}: give a longer clip, or a "
                "smaller physics.operator.stride"
            )
        self.space.check((channels, height, width))

    def draw(
        self,
        batch_size: int,
        image_shape: tuple[int, ...],
        generator: Generators = None,
        device: torch.device | str = "cpu",
    ) -> SpaceTime:
        """Return the operator for clips (C, T, H, W)."""
        self.check(image_shape)
        channels, frames, height, width = image_shape
        spatial = self.space.draw(batch_size, (channels, height, width), generator, device)
        return SpaceTime(exposures(frames, self.exposure, self.stride), spatial, image_shape, device)

    def image_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return (C, T, H, W) of the clip: ``stride`` frames for each of y."""
        channels, frames, *size = y_shape
        channels, *size = self.space.image_shape((channels, size[0], size[1]))
        return channels, frames * self.stride, *size

    def y_channels(self, channels: int) -> int:
        """Return the channels of y."""
        return self.space.y_channels(channels)

    def of_scene(self) -> "VideoOperator":
        """Return the family whose operator on images is that of a scene which goes on beyond the picture."""
        return VideoOperator(self.space.of_scene(), self.exposure, self.stride)


def exposures(frames: int, exposure: int, stride: int) -> Tensor:
    """Return the matrix [ceil(T / stride), T] of ``VideoOperator``, in float64."""
    rows = -(-frames // stride)
    first = torch.arange(rows) * stride - max(0, exposure - stride) // 2
    seen = (first.unsqueeze(1) + torch.arange(exposure)).clamp(0, frames - 1)
    matrix = torch.zeros(rows, frames, dtype=torch.float64)
    return matrix.scatter_add_(1, seen, torch.full(seen.shape, 1 / exposure, dtype=torch.float64))
