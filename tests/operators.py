"""Operators under test and their dense matrices."""

from collections.abc import Callable

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from ud2m.physics import (
    BlurMixture,
    BoundedBlur,
    CircularBlur,
    CircularDownsampling,
    Colorization,
    DdrmBlur,
    DdrmSuperResolution,
    DeepinvOperator,
    Denoising,
    GaussianBlur,
    Inpainting,
    Mixture,
    MotionBlur,
    OperatorFamily,
    PixelMask,
    SpaceTime,
    SuperResolution,
    UniformBlur,
    VideoOperator,
)

BATCH = 2
Shape = tuple[int, ...]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kernel(*shape: int) -> Tensor:
    """Return a positive kernel without any symmetry, of sum 1, whose spectrum has no small values."""
    values = torch.rand(shape, generator=generator(5), dtype=torch.float64)
    values[..., shape[-2] // 2, shape[-1] // 2] += 0.6 * values.flatten(-2).sum(-1)
    return values / values.sum((-2, -1), keepdim=True)


def drawn(family: OperatorFamily, shape: Shape) -> tuple[LinearPhysics, Shape]:
    return family.draw(BATCH, shape, generator(1)), shape


def made(
    operator: Callable[..., LinearPhysics], values: Tensor, shape: Shape, *args: int | str
) -> tuple[LinearPhysics, Shape]:
    return operator(values, shape, *args), shape


# Heights and widths differ, and odd widths occur: half spectra treat the last axis in a special way.
CASES: dict[str, Callable[[], tuple[LinearPhysics, Shape]]] = {
    "blur": lambda: drawn(GaussianBlur(0.8), (2, 8, 11)),
    "wide blur": lambda: drawn(GaussianBlur(1.6), (1, 13, 16)),
    "blur per sample": lambda: made(CircularBlur, kernel(BATCH, 1, 5, 4), (2, 7, 8)),
    "blur per channel": lambda: made(CircularBlur, kernel(1, 2, 3, 5), (2, 8, 7)),
    "anisotropic blur": lambda: drawn(GaussianBlur((0.6, 1.1), angle=30), (1, 11, 9)),
    "uniform blur": lambda: drawn(UniformBlur(3), (1, 8, 10)),
    "motion blur": lambda: drawn(MotionBlur(5), (2, 8, 7)),
    "valid blur": lambda: drawn(GaussianBlur(0.6, boundary="valid"), (1, 10, 9)),
    "valid blur per sample": lambda: made(BoundedBlur, kernel(BATCH, 1, 5, 4), (2, 8, 9), "valid"),
    "zero box": lambda: drawn(UniformBlur(2, "zero"), (2, 7, 9)),
    "zero blur": lambda: made(BoundedBlur, kernel(1, 1, 3, 5), (2, 7, 8), "zero"),
    "sr 2": lambda: drawn(SuperResolution(2), (2, 8, 10)),
    "sr 3": lambda: drawn(SuperResolution(3), (1, 12, 15)),
    "sr 4": lambda: drawn(SuperResolution(4), (1, 16, 20)),
    "sr 4 box": lambda: drawn(SuperResolution(4, "box"), (3, 8, 4)),
    "sr per sample": lambda: made(CircularDownsampling, kernel(BATCH, 2, 4, 6), (2, 6, 8), 2),
    "separable": lambda: drawn(DdrmBlur("gaussian", mixed=False), (2, 9, 9)),
    "separable, gains in disorder": lambda: drawn(DdrmBlur("uniform"), (3, 11, 11)),
    "separable decimation": lambda: drawn(DdrmSuperResolution(2), (1, 12, 12)),
    "denoising": lambda: drawn(Denoising(), (2, 4, 5)),
    "colorization": lambda: drawn(Colorization(), (3, 5, 4)),
    "mri": lambda: drawn(DeepinvOperator("MRI", {"mask": (torch.eye(8) + torch.ones(8, 1) > 1).float()}), (2, 8, 8)),
    "blur mixture": lambda: drawn(BlurMixture([UniformBlur(2), GaussianBlur(0.6)]), (1, 8, 9)),
    "mixture": lambda: drawn(Mixture([SuperResolution(2), Inpainting(0.5)]), (1, 8, 10)),
    "inpainting": lambda: drawn(Inpainting(0.7), (3, 6, 7)),
    "mean of frames and sr": lambda: drawn(VideoOperator(SuperResolution(2, "box"), 2, 2), (1, 5, 4, 6)),
    "blur in time": lambda: drawn(VideoOperator(GaussianBlur(0.6), 3), (1, 3, 7, 8)),
    "dropped frames and a mask per sample": lambda: drawn(VideoOperator(Inpainting(0.5), 1, 2), (2, 4, 3, 3)),
    "frames of lower rank": lambda: (
        SpaceTime(
            torch.tensor([[1.0, 2, 0], [2, 4, 0], [0, 1, 1]]),
            CircularBlur(kernel(BATCH, 1, 3, 3), (1, 4, 5)),
            (1, 3, 4, 5),
        ),
        (1, 3, 4, 5),
    ),
    "inpainting per channel": lambda: (PixelMask(1 - torch.eye(6).expand(1, 2, 6, 6), (2, 6, 6)), (2, 6, 6)),
}


def dense(apply: Callable[[Tensor], Tensor], shape: Shape) -> Tensor:
    """Return the matrices [B, m, n] of a linear map on batches, column by column, in float64."""
    size = torch.Size(shape).numel()
    basis = torch.eye(size, dtype=torch.float64).view(size, 1, *shape).expand(size, BATCH, *shape)
    return torch.stack([apply(e).flatten(1) for e in basis], dim=-1)
