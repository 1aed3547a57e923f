"""A denoiser that sees every image in a random orientation: an average over samples is one over orientations too."""

import torch
from torch import Tensor

from ud2m.noise import Generators, rand
from ud2m.tiling import Denoiser

SYMMETRIES = (1, 2, 8)
"""Numbers of orientations that can be chosen from: none, left-right flips, all of the square."""


def check_symmetries(count: int) -> None:
    """Raise ValueError unless ``count`` is one of ``SYMMETRIES``."""
    if count not in SYMMETRIES or isinstance(count, bool):
        raise ValueError(f"symmetries must be 1 (none), 2 (left-right flips) or 8 (those of the square), got {count!r}")


def symmetric(denoiser: Denoiser, count: int, generator: Generators) -> Denoiser:
    """Return T^-1 denoiser(T z, sigma) with another random symmetry T for every sample and call.

    A network is not exactly equivariant to flips and quarter turns, though images and white noise are in distribution:
    its errors under different T differ, and partly cancel over modules, steps and samples (Terris et al., "Equivariant
    plug-and-play image reconstruction", CVPR 2024). It costs no evaluation. Differs from [UD2M],
    which has no such thing.

    Args:
        denoiser: (z [B, C, H, W], sigma [B]) -> x0_hat.
        count: 1, 2 or 8 orientations; of the 8, only the 4 that keep the shape are used where H and W differ.
        generator: source of T.
    """
    if count == 1:
        return denoiser

    def turned(z: Tensor, sigma: Tensor) -> Tensor:
        across, down, transposed = draw(z, count, generator)
        x0_hat = denoiser(_flip(_flip(_transpose(z, transposed), down, -2), across, -1), sigma)
        return _transpose(_flip(_flip(x0_hat, across, -1), down, -2), transposed)

    return turned


def draw(z: Tensor, count: int, generator: Generators) -> tuple[Tensor, Tensor, Tensor]:
    """Return bool [B, 1, 1, 1]: which samples of z are flipped across, flipped down, and transposed before that."""
    coins = (rand((len(z), 3), generator, z.device) < 0.5).view(-1, 3, 1, 1, 1)
    return coins[:, 0], coins[:, 1] & (count == 8), coins[:, 2] & (count == 8)


def _flip(x: Tensor, wanted: Tensor, axis: int) -> Tensor:
    return torch.where(wanted, x.flip(axis), x)


def _transpose(x: Tensor, wanted: Tensor) -> Tensor:
    return torch.where(wanted, x.transpose(-1, -2), x) if _is_square(x) else x


def _is_square(x: Tensor) -> bool:
    return x.shape[-1] == x.shape[-2]
