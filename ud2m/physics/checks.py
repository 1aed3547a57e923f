"""What is refused of an observation, and what its operator says of the noise."""

import warnings
from typing import cast

import torch
from torch import Tensor, nn

from ud2m.images import MEASURED_RANGE
from ud2m.physics.data_term import DataTerm
from ud2m.physics.measurement import image_shape
from ud2m.physics.rows import at_least_float32


class NoiseLevelWarning(UserWarning):
    """The noise model of an operator and a call have different noise levels."""


def check_observation(y: Tensor) -> Tensor:
    """Return y [B, ...], at least in float32.

    Raises:
        ValueError: when it holds other numbers than finite floats.
    """
    if not y.is_floating_point():
        raise ValueError(
            f"y must hold floats in image units (images lie in [0, 1]), got {y.dtype}: divide 8-bit values by 255, and "
            "give complex ones as two channels"
        )
    wrong = ~y.isfinite().flatten(1).all(1) if len(y) else torch.ones(1, dtype=torch.bool)
    if wrong.any():
        samples = ", ".join(map(str, torch.nonzero(wrong)[:, 0].tolist()))
        raise ValueError(f"y holds NaN or infinity (observation {samples} of {len(y)}); a mask says what is missing")
    return y.to(at_least_float32(y))


def check_numbers(physics: DataTerm) -> None:
    """Raise ValueError for an operator with a parameter that holds NaN or infinity."""
    if isinstance(physics, nn.Module):
        for name, tensor in [*physics.named_buffers(), *physics.named_parameters()]:
            if not tensor.isfinite().all():
                raise ValueError(f"{name} of the operator {type(physics).__name__} holds NaN or infinity")


@torch.no_grad()
def check_range(physics: DataTerm, y: Tensor, sigma_y: Tensor) -> None:
    """Raise ValueError for y that no image in [0, 1] can give, as of images in [-1, 1] or [0, 255].

    Operators that keep brightness are told from others, as random projections, by what they make of white and of a
    random image: hardly anything below 0.

    Args:
        physics: the operator.
        y: [B, ...].
        sigma_y: [1 or B].
    """
    white = y.new_ones(len(y), *image_shape(physics, y))
    generator = torch.Generator().manual_seed(0)
    some = torch.rand(white.shape[1:], generator=generator).to(white).expand(white.shape)
    top = physics.A(white).max()
    if not physics.A(some).min() > -top / 4:
        return
    low, high = (edge * top + sign * 6 * sigma_y.max() for edge, sign in zip(MEASURED_RANGE, (-1, 1), strict=True))
    if y.min() < low or y.max() > high:
        raise ValueError(
            f"y holds values from {y.min().item():.3g} to {y.max().item():.3g}, but this operator makes values from 0 "
            f"to {top.item():.3g} of images in [0, 1]: divide 8-bit values by 255, map [-1, 1] to [0, 1]"
        )


def told_level(physics: DataTerm) -> Tensor | None:
    """Return the noise level that deepinv's ``physics.noise_model.sigma`` says, if it does."""
    sigma = getattr(getattr(physics, "noise_model", None), "sigma", None)
    if sigma is None:
        return None
    levels = cast(Tensor, torch.as_tensor(sigma))
    return levels if bool((levels > 0).all()) else None


def warn_of_another_level(physics: DataTerm, sigma_y: Tensor) -> None:
    """Warn where the operator's noise model says another level than ``sigma_y`` [1 or B]."""
    told = told_level(physics)
    if told is not None and not torch.allclose(told.reshape(-1).to(sigma_y), sigma_y, rtol=0.01):
        warnings.warn(
            f"noise_model.sigma of the operator is {_listed(told)}, but sigma_y={_listed(sigma_y)} was given, which is "
            "used",
            NoiseLevelWarning,
            stacklevel=4,
        )


def _listed(levels: Tensor) -> str:
    return ", ".join(f"{level:.4g}" for level in levels.reshape(-1).tolist())
