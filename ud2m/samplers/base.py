"""What all samplers share: their checks, and independent random streams for the samples."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ud2m.physics import DataTerm, select_samples


def draw_in_chunks(
    draw: Callable[[Tensor, Any, Tensor, list[torch.Generator]], Tensor],
    y: Tensor,
    physics: DataTerm,
    sigma_y: Tensor,
    num_samples: int,
    chunk_size: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Return samples [B, S, C, H, W] in [0, 1] for observations y [B, ...], of at most ``chunk_size`` rows at once.

    Args:
        draw: (y, physics, sigma_y, streams) -> one image per row. Each sample has a stream of its own, so that it does
            not depend on the chunks.
        sigma_y: [B]. generator: seeds the streams; on any device.
    """
    seeds = torch.randint(2**62, (len(y) * num_samples,), generator=generator, device=_device(generator)).tolist()
    rows = torch.arange(len(y), device=y.device).repeat_interleave(num_samples)
    samples = [
        draw(
            y[chunk],
            select_samples(physics, chunk),
            sigma_y[chunk],
            [torch.Generator(y.device).manual_seed(seed) for seed in part],
        )
        for chunk, part in zip(rows.split(chunk_size), _split(seeds, chunk_size), strict=True)
    ]
    return torch.cat(samples).clamp(0, 1).unflatten(0, (len(y), num_samples))


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless a count is an integer >= 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless a number is positive and finite."""
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def noise_levels(sigma_y: float | Tensor, y: Tensor) -> Tensor:
    """Return sigma_y as a float tensor [B] for observations y; raises ValueError unless all are positive and finite."""
    levels = torch.as_tensor(sigma_y, device=y.device, dtype=y.dtype).reshape(-1)
    if len(levels) not in (1, len(y)) or not (levels > 0).all() or not levels.isfinite().all():
        raise ValueError(
            f"sigma_y must be a positive noise level in image units (images lie in [0, 1]), one number or one per "
            f"observation ({len(y)}); got {levels.tolist()}"
        )
    return levels.expand(len(y))


def _split(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _device(generator: torch.Generator | None) -> torch.device | str:
    return "cpu" if generator is None else generator.device
