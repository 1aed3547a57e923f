"""Denoise pictures that are too large for the network at once, in overlapping tiles."""

from collections.abc import Callable

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
OVERLAP = 0.25
"""Share of a tile's side that it has in common with the next one, at least."""


def tiled(denoiser: Denoiser, tile: int | None) -> Denoiser:
    """Return a denoiser that calls another one on tiles of ``tile`` x ``tile`` pixels and blends them.

    x0_hat = sum_t w_t denoiser(tile_t) / sum_t w_t, where w_t rises linearly from the edges of tile t to 1 over a
    quarter of its side, which it shares with its neighbours: the result is continuous across every edge. Only the
    network sees tiles; noise, prox and measurement are those of the whole picture.

    Args:
        denoiser: ``denoiser(x_sigma [B, C, H, W], sigma [B]) -> x0_hat``.
        tile: side in pixels, at least 16; pictures that fit into one tile, or None, go to the denoiser as they are.

    Raises:
        ValueError: for another side.
    """
    if tile is None:
        return denoiser
    if not isinstance(tile, int) or tile < 16:
        raise ValueError(f"tile (side in pixels) must be an integer of at least 16, got {tile!r}")

    def denoise(x_sigma: Tensor, sigma: Tensor) -> Tensor:
        height, width = x_sigma.shape[2:]
        if max(height, width) <= tile:
            return denoiser(x_sigma, sigma)
        rows, columns = tile_starts(height, tile), tile_starts(width, tile)
        weight = torch.outer(ramp(min(tile, height)), ramp(min(tile, width))).to(x_sigma)
        total, weights = torch.zeros_like(x_sigma), torch.zeros_like(x_sigma[:1, :1])
        for top in rows:
            for left in columns:
                place = (..., slice(top, top + tile), slice(left, left + tile))
                total[place] += weight * denoiser(x_sigma[place], sigma)
                weights[place] += weight
        return total / weights

    return denoise


def tile_starts(length: int, tile: int) -> list[int]:
    """Return the first pixels of tiles that cover ``length`` pixels evenly, overlapping by a quarter or more."""
    if length <= tile:
        return [0]
    step = tile - round(OVERLAP * tile)
    count = -(-(length - tile) // step) + 1
    return [round(k * (length - tile) / (count - 1)) for k in range(count)]


def ramp(side: int) -> Tensor:
    """Return weights of a tile's pixels along one axis: distance to the nearer edge over the overlap, at most 1."""
    position = torch.arange(side, dtype=torch.float32) + 0.5
    distance = torch.minimum(position, side - position)
    return (distance / max(1, round(OVERLAP * side))).clamp(max=1)
