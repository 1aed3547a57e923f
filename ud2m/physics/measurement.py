"""Making measurements, and judging images by them."""

from functools import singledispatch
from typing import cast

import deepinv
import torch
from deepinv.models import PatchCovarianceNoiseEstimator
from deepinv.physics import LinearPhysics
from torch import Tensor

from ud2m.physics.data_term import DataTerm
from ud2m.physics.rows import at_least_float32, per_sample
from ud2m.random import Generators, randn_like

EXPLAINED = (0.85, 1.2)
"""Residuals at which nothing is wrong."""
ROUNDING = 1e-5
"""What rounding leaves of an image in [0, 1], and no noise."""


@singledispatch
def measured(physics: DataTerm, y: Tensor) -> Tensor:
    """Return 1 where an entry of y [B, ...] is a measurement, 0 where the operator gives 0 whatever x is.

    The result broadcasts against y. By default everything is measured; operators with dead entries register.
    """
    return torch.ones((), dtype=y.dtype, device=y.device)


@measured.register
def _(physics: deepinv.physics.Inpainting, y: Tensor) -> Tensor:
    return (physics.mask != 0).to(y)


@singledispatch
def image_shape(physics: DataTerm, y: Tensor) -> tuple[int, ...]:
    """Return (C, H, W) of the images whose observations y [B, ...] are; by default that of A^T y."""
    return tuple(cast(LinearPhysics, physics).A_adjoint(y[:1]).shape[1:])


@singledispatch
def mean_gain(physics: DataTerm, like: Tensor) -> Tensor:
    """Return |A w|^2 / |w|^2 [B] for one fixed image w of white noise, shaped as ``like`` [B, C, H, W].

    Near tr(A^T A) / n: about the share of pixels that a mask keeps, the sum of squares of a kernel.
    """
    w = _white_noise(like)
    return physics.A(w).flatten(1).square().sum(1) / w.flatten(1).square().sum(1)


@singledispatch
def kept_gain(physics: DataTerm, like: Tensor) -> Tensor:
    """Return |A^T A w|^2 / |A w|^2 [B] for the w of ``mean_gain``: how strongly the operator passes on what it keeps.

    Near tr((A^T A)^2) / tr(A^T A): 1 for a mask, whatever it hides, about 1/2 for a Gaussian blur.
    """
    y = physics.A(_white_noise(like))
    kept = cast(LinearPhysics, physics).A_adjoint(y).flatten(1).square().sum(1)
    return kept / y.flatten(1).square().sum(1).clamp_min(torch.finfo(y.dtype).tiny)


def largest_gain(physics: LinearPhysics, like: Tensor, iterations: int = 100) -> Tensor:
    """Return |A|^2 [B], each sample's largest eigenvalue of A^T A, by power iteration from the w of ``mean_gain``.

    deepinv's ``compute_norm`` knows one number for all samples, and begins at random.
    """
    x = _white_noise(like)
    for _ in range(iterations):
        x = physics.A_adjoint(physics.A(x / per_sample(x.flatten(1).norm(dim=1), x)))
    return x.flatten(1).norm(dim=1)


def _white_noise(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(20_250_703)  # a seed that no mask is drawn with
    return torch.randn(like.shape[1:], generator=generator).to(like).expand(like.shape)


@singledispatch
def observe(physics: DataTerm, x0: Tensor, sigma_y: Tensor | float, generator: Generators = None) -> Tensor:
    """Return y = A x0 + sigma_y w, w ~ N(0, I) where something is measured and 0 elsewhere.

    Args:
        physics: operator of this batch.
        x0: [B, C, H, W] in [0, 1].
        sigma_y: noise level in image units, >= 0; a number or [B].
        generator: source of w, on any device, or one per sample; None uses torch's global one.

    Raises:
        ValueError: when ``sigma_y`` is negative.
    """
    y = physics.A(x0)
    level = per_sample(sigma_y, y)
    if not (level >= 0).all():
        raise ValueError(f"sigma_y must not be negative, got {level.min().item():g}")
    return y + level * measured(physics, y) * randn_like(y, generator)


@singledispatch
def residual(physics: DataTerm, x: Tensor, y: Tensor, sigma_y: Tensor | float) -> Tensor:
    """Return |A x - y| / (sigma_y sqrt(m)) per sample, [B], with m the number of real measurements.

    About 1 where x explains y; the true image has 1 +- 1 / sqrt(2 m). An observation that is no A x + noise registers
    what it has instead (``JpegCodec``: the share of coefficients that are not the file's).

    Raises:
        ValueError: when ``sigma_y`` is not positive.
    """
    dtype = at_least_float32(x, y)
    error = physics.A(x.to(dtype)) - y.to(dtype)
    level = per_sample(sigma_y, error)
    if not (level > 0).all():
        raise ValueError(f"sigma_y must be positive to judge a residual, got {level.min().item():g}")
    weight = measured(physics, error).expand_as(error)
    return (weight * error / level).flatten(1).norm(dim=1) / weight.flatten(1).sum(1).sqrt()


@singledispatch
def misfit(physics: DataTerm, value: float) -> str:
    """Return a hint where the ``residual`` of samples says that they do not fit the observation, else nothing."""
    low, high = EXPLAINED
    if not value <= high:  # nor NaN
        return (
            f"the samples do not explain the observation (residual {value:.2f}, about 1 is right): sigma_y is too "
            "small, or the operator is another one than given. Try a larger sigma_y, or sigma_y=auto; of a blur another"
            " width or kernel, and physics.operator.boundary=valid for a photograph"
        )
    if value < low:
        return (
            f"the samples follow the noise of the observation (residual {value:.2f}, about 1 is right): sigma_y may be "
            "too large. Try a smaller one, or sigma_y=auto; of a blur another width or kernel, or boundary"
        )
    return ""


@singledispatch
def estimate_sigma_y(physics: DataTerm, y: Tensor) -> Tensor:
    """Return estimates of the noise level of observations y [B, C, h, w], in image units, [B].

    From the small eigenvalues of the covariance of patches, which a scene does not reach (Chen et al., "An efficient
    statistical method for image noise level estimation", ICCV 2015; deepinv's estimator), in the central 1024 x 1024
    pixels. White noise is assumed: grain that a camera has smoothed or compressed is underestimated.

    Of channels that are copies of each other one is looked at, and none that is constant: the covariance would be
    singular.

    Raises:
        ValueError: when y is no image of at least 32 x 32 pixels, has holes, or no noise that can be told.
    """
    if y.ndim != 4 or min(y.shape[2:]) < 32:
        raise ValueError(
            f"the noise level is estimated of images of at least 32x32 pixels, got {list(y.shape[1:])}; give sigma_y"
        )
    if not bool((measured(physics, y) == 1).all()):
        raise ValueError("the noise level of an observation with missing entries cannot be estimated; give sigma_y")
    top, left = (max(0, (side - 1024) // 2) for side in y.shape[2:])
    centre = y[:, :, top : top + 1024, left : left + 1024].float()
    return torch.stack([_noise_of(image) for image in centre]).to(y)


def _noise_of(image: Tensor) -> Tensor:
    """Return the noise level of [C, h, w]."""
    own = [
        channel
        for k, channel in enumerate(image)
        if all((channel - other).abs().max() > ROUNDING for other in (channel.mean(), *image[:k]))
    ]
    stride = 1 if min(image.shape[1:]) < 128 else 2  # enough patches of a small image, few enough of a large one
    try:
        level = PatchCovarianceNoiseEstimator.estimate_noise(torch.stack(own)[None], stride=stride)[0]
    except RuntimeError:  # of no channels, or of eigenvalues that have no middle
        level = image.new_zeros(())
    if not level > ROUNDING:  # nor NaN
        raise ValueError(
            "the noise level cannot be estimated: the observation is flat, without noise, or its channels follow from "
            "each other; give sigma_y"
        )
    return level
