"""Denoisers around a denoiser: in less precision, in overlapping tiles, and in random orientations."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ud2m.numbers import is_whole
from ud2m.precision import check_precision, network_precision
from ud2m.random import Generators, rand

Denoiser = Callable[[Tensor, Tensor], Tensor]
OVERLAP = 64
"""Pixels that a tile has in common with the next one, at least; a quarter of its side where that is less."""
MULTIPLE = 16
"""Of which the sides of tiles are multiples where they can be: of the total stride of networks."""


def tile_count(size: Sequence[int], tile: int | None) -> int:
    """Return the tiles of a picture [H, W]."""
    if tile is None or max(size) <= tile:
        return 1
    return math.prod(len(tile_places(side, tile)) for side in size)


def check_tile(tile: int | None) -> None:
    """Raise ValueError unless ``tile`` is None or a side that tiles can have."""
    if tile is not None and (not is_whole(tile) or tile < 16):
        raise ValueError(f"tile (side in pixels) must be an integer of at least 16, got {tile!r}")


def tiled(denoiser: Denoiser, tile: int | None) -> Denoiser:
    """Return a denoiser that calls another one on tiles of ``tile`` x ``tile`` pixels and blends them.

    x0_hat = sum_t w_t denoiser(tile_t) / sum_t w_t, where w_t rises linearly from the edges of tile t to 1 over what it
    shares with its neighbours: the result is continuous across every edge. Only the network sees tiles; noise, prox and
    measurement are those of the whole picture.

    Args:
        denoiser: ``denoiser(x_sigma [B, C, H, W], sigma [B]) -> x0_hat``.
        tile: largest side in pixels, at least 16; pictures that fit into one tile, or None, go to the denoiser as they
            are.

    Raises:
        ValueError: for another side.
    """
    check_tile(tile)
    if tile is None:
        return denoiser

    def denoise(x_sigma: Tensor, sigma: Tensor) -> Tensor:
        height, width = x_sigma.shape[2:]
        if max(height, width) <= tile:
            return denoiser(x_sigma, sigma)
        total, weights = torch.zeros_like(x_sigma), torch.zeros_like(x_sigma[:1, :1])
        for rows in tile_places(height, tile):
            for columns in tile_places(width, tile):
                place = (..., rows, columns)
                weight = torch.outer(ramp(rows, tile), ramp(columns, tile)).to(x_sigma)
                total[place] += weight * denoiser(x_sigma[place], sigma)
                weights[place] += weight
        return total / weights

    return denoise


def tile_places(length: int, tile: int) -> list[slice]:
    """Return the places of tiles that cover ``length`` pixels evenly: as few as can be, no larger than they must."""
    if length <= tile:
        return [slice(0, length)]
    shared = _overlap(tile)
    count = -(-(length - shared) // (tile - shared))
    side = min(tile, MULTIPLE * -(-(length + (count - 1) * shared) // (count * MULTIPLE)))
    starts = [round(k * (length - side) / (count - 1)) for k in range(count)]
    return [slice(start, start + side) for start in starts]


def ramp(place: slice, tile: int) -> Tensor:
    """Return weights of a tile's pixels along one axis: distance to the nearer edge over the overlap, at most 1."""
    side = place.stop - place.start
    position = torch.arange(side, dtype=torch.float32) + 0.5
    distance = torch.minimum(position, side - position)
    return (distance / _overlap(tile)).clamp(max=1)


def _overlap(tile: int) -> int:
    return min(OVERLAP, round(tile / 4))


SYMMETRIES = (1, 2, 8)
"""Numbers of orientations that can be chosen from: none, left-right flips, all of the square."""


def check_symmetries(count: int) -> None:
    """Raise ValueError unless ``count`` is one of ``SYMMETRIES``."""
    if count not in SYMMETRIES or isinstance(count, bool):
        raise ValueError(f"symmetries must be 1 (none), 2 (left-right flips) or 8 (those of the square), got {count!r}")


def in_precision(denoiser: Denoiser, precision: str) -> Denoiser:
    """Return a denoiser whose network is evaluated in a precision (``ud2m.precision.network_precision``).

    What it returns is x_sigma - sigma eps_hat in the precision of x_sigma: eps_hat alone has been rounded.
    """
    check_precision(precision)
    if precision == "float32":
        return denoiser

    def denoise(x_sigma: Tensor, sigma: Tensor) -> Tensor:
        with network_precision(precision, x_sigma.device):
            return denoiser(x_sigma, sigma)

    return denoise


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

    Raises:
        ValueError: for another number.
    """
    check_symmetries(count)
    if count == 1:
        return denoiser

    def turned(z: Tensor, sigma: Tensor) -> Tensor:
        there, back = orientations(z, draw(z, count, generator))
        return _taken(denoiser(_taken(z, there), sigma), back)

    return turned


def draw(z: Tensor, count: int, generator: Generators) -> tuple[Tensor, Tensor, Tensor]:
    """Return bool [B, 1, 1, 1]: which samples of z are flipped across, flipped down, and transposed before that."""
    coins = (rand((len(z), 3), generator, z.device) < 0.5).view(-1, 3, 1, 1, 1)
    return coins[:, 0], coins[:, 1] & (count == 8), coins[:, 2] & (count == 8)


def orientations(z: Tensor, coins: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return where each pixel of T z lies in z, and each of T^-1 z, as indices [B, H W] into the pixels of z.

    Images are read through them once: the three steps of T one by one would write every image six times.

    Args:
        z: images [B, C, H, W].
        coins: what ``draw`` returns; images that are not square are not transposed.
    """
    across, down, transposed = (coin.view(-1, 1, 1) for coin in coins)
    height, width = z.shape[-2:]
    row, column = torch.arange(height, device=z.device), torch.arange(width, device=z.device)
    rows = torch.where(down, row.flip(0).view(-1, 1), row.view(-1, 1))
    columns = torch.where(across, column.flip(0), column)
    there = back = rows * width + columns
    if height == width:
        there = torch.where(transposed, columns * width + rows, there)  # T transposes before it flips
        back = torch.where(transposed, back.transpose(-1, -2), back)
    return there.flatten(1), back.flatten(1)


def _taken(z: Tensor, places: Tensor) -> Tensor:
    return z.flatten(2).gather(2, places.unsqueeze(1).expand(-1, z.shape[1], -1)).view(z.shape)
