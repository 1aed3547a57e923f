"""Baseline JPEG up to the entropy coder: from pixels to quantised DCT coefficients, as the usual encoder computes them.

ITU-T T.81 leaves the arithmetic open. To give the very coefficients that libjpeg (with its default "slow integer" DCT)
and so nearly every program writes, colour transform, averaging, DCT and quantisation are done here in the same
integers, carried in float64, where they are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ud2m.numbers import is_whole

BLOCK = 8
FACTORS = {"4:4:4": (1, 1), "4:2:2": (1, 2), "4:2:0": (2, 2)}
"""Pixels (down, across) of which one chroma value is the average."""

LUMINANCE_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *(((99,) * 8,) * 4),
)
"""Quantisation steps at quality 50 [ITU-T T.81, annex K], row by row from the lowest frequency."""

YCBCR = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
"""R, G, B -> Y, Cb, Cr [JFIF 1.02]."""


def quantisation_table(quality: int, table: Sequence[Sequence[int]]) -> Tensor:
    """Return the steps [8, 8] of a quality factor in 1..100, by the scaling of the Independent JPEG Group."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(table, dtype=torch.float64) * scale + 50) / 100).floor().clamp(1, 255)


def quality_tables(quality: int, channels: int) -> Tensor:
    """Return the tables of all components, float64 [channels, 8, 8], of a quality factor in 1..100.

    Raises:
        ValueError: when the quality factor is no integer in that range.
    """
    if not is_whole(quality) or not 1 <= quality <= 100:
        raise ValueError(f"the JPEG quality factor must be an integer in 1..100, got {quality!r}")
    luminance = quantisation_table(quality, LUMINANCE_TABLE)
    chrominance = quantisation_table(quality, CHROMINANCE_TABLE)
    return torch.stack([luminance, chrominance, chrominance][:channels])


def to_blocks(plane: Tensor) -> Tensor:
    """Return a plane [..., H, W] as its blocks [..., H/8, W/8, 8, 8]."""
    return plane.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).transpose(-3, -2)


def from_blocks(blocks: Tensor) -> Tensor:
    """Return the plane [..., H, W] of blocks [..., H/8, W/8, 8, 8]."""
    return blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)


@cache
@torch.inference_mode(False)  # one that validation makes must serve training too
def dct_matrix(dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """Return the orthonormal 8-point DCT D [8, 8]; a block X becomes D X D^T."""
    k, n = torch.arange(BLOCK, dtype=torch.float64).view(-1, 1), torch.arange(BLOCK, dtype=torch.float64)
    matrix = torch.cos(torch.pi * (2 * n + 1) * k / 16) / 2
    matrix[0] /= 2**0.5
    return matrix.to(device, dtype)


@cache
@torch.inference_mode(False)
def integer_dct_matrix() -> Tensor:
    """Return the 8-point DCT of libjpeg, scaled by 2^13 sqrt(8), as the integers [8, 8] that its butterfly amounts to.

    Twelve constants are rounded to 13 bits (Loeffler, Ligtenberg and Moschytz, "Practical fast 1-D DCT algorithms with
    11 multiplications", ICASSP 1989); each entry is a sum of them, which is not always the rounded entry.
    """

    def fixed(value: float) -> int:
        return round(value * 2**13)

    one, even = 2**13, fixed(0.541196100)
    high, low = even + fixed(0.765366865), even - fixed(1.847759065)
    z5, z1, z2 = fixed(1.175875602), -fixed(0.899976223), -fixed(2.562915447)
    z3, z4 = z5 - fixed(1.961570560), z5 - fixed(0.390180644)
    # odd rows act on the differences x0 - x7, x1 - x6, x2 - x5, x3 - x4; even rows on the sums
    odd = {
        1: (fixed(1.501321110) + z1 + z4, z5, z4, z1 + z5),
        3: (z5, fixed(3.072711026) + z2 + z3, z2 + z5, z3),
        5: (z4, z2 + z5, fixed(2.053119869) + z2 + z4, z5),
        7: (z1 + z5, z3, z5, fixed(0.298631336) + z1 + z3),
    }
    sums = {
        0: (one, one, one, one),
        2: (high, even, -even, -high),
        4: (one, -one, -one, one),
        6: (even, low, -low, -even),
    }
    rows = [
        (*half, *(reversed(half) if k in sums else [-v for v in reversed(half)]))
        for k, half in sorted((sums | odd).items())
    ]
    return torch.tensor(rows, dtype=torch.float64)


def shifted(value: Tensor, bits: int) -> Tensor:
    """Return value / 2^bits, rounded to the nearest integer, halves up."""
    return ((value + 2 ** (bits - 1)) / 2**bits).floor()


def integer_dct(blocks: Tensor) -> Tensor:
    """Return 8 times the DCT of integer blocks [..., 8, 8] in -128..127, rounded after rows and columns."""
    matrix = integer_dct_matrix().to(blocks)
    return shifted(matrix @ shifted(blocks @ matrix.T, 11), 15)


def integer_ycbcr(pixels: Tensor) -> Tensor:
    """Return Y, Cb, Cr in 0..255 of pixels [..., 3, H, W] in 0..255, with 16-bit fixed-point weights."""
    weights = (torch.tensor(YCBCR, dtype=torch.float64) * 2**16).round().to(pixels)
    offset = torch.tensor([2**15, 2**23 + 2**15 - 1, 2**23 + 2**15 - 1]).to(pixels).view(3, 1, 1)
    return ((torch.einsum("dc,...chw->...dhw", weights, pixels) + offset) / 2**16).floor()


def padded(plane: Tensor, height: int, width: int) -> Tensor:
    """Return a plane [..., H, W] with its last row and column repeated up to height x width."""
    rows = (0, width - plane.shape[-1], 0, height - plane.shape[-2])
    return pad(plane, rows, mode="replicate") if any(rows) else plane


def integer_average(plane: Tensor, factors: tuple[int, int]) -> Tensor:
    """Return averages of factors (down, across) pixels as integers; halves go up and down in turn along a row."""
    if factors == (1, 1):
        return plane
    down, across = factors
    total = plane.unflatten(-1, (-1, across)).unflatten(-3, (-1, down)).sum((-3, -1))
    low = down * across // 2 - 1 if down > 1 else 0
    bias = low + torch.arange(total.shape[-1], device=plane.device) % 2
    return ((total + bias) / (down * across)).floor()


def up(length: int, multiple: int) -> int:
    """Return the smallest multiple that is not below ``length``."""
    return -(-length // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """Sizes of one kind of JPEG picture.

    Args:
        height: of the picture in pixels.
        width: of the picture in pixels.
        channels: 1 (grey) or 3.
        factors: pixels (down, across) per chroma value.
    """

    height: int
    width: int
    channels: int
    factors: tuple[int, int] = (1, 1)

    @property
    def full(self) -> tuple[int, int]:
        """Height and width of the picture padded to whole groups of blocks."""
        down, across = self.factors if self.channels == 3 else (1, 1)
        return up(self.height, BLOCK * down), up(self.width, BLOCK * across)

    def of(self, component: int) -> tuple[int, int]:
        """Return the factors of a component: those of chroma, and (1, 1) of luminance."""
        return self.factors if component else (1, 1)

    def stored(self, component: int) -> tuple[int, int]:
        """Return the height and width of a component's plane up to the last block that a file stores."""
        down, across = self.of(component)
        return up(-(-self.height // down), BLOCK), up(-(-self.width // across), BLOCK)


def encode(x: Tensor, layout: Layout, tables: Tensor) -> list[Tensor]:
    """Return the quantised DCT coefficients that an encoder stores for a picture.

    Args:
        x: [B, C, H, W] in [0, 1]; rounded to 8 bits.
        layout: sizes of the picture.
        tables: [B or 1, C, 8, 8].

    Returns:
        For each component integers [B, rows, columns, 8, 8], in float64.
    """
    pixels = (x.double().clamp(0, 1) * 255).round()
    planes = integer_ycbcr(pixels) if layout.channels == 3 else pixels
    coefficients = []
    for component in range(layout.channels):
        down, across = layout.of(component)
        rows, columns = layout.stored(component)
        # libjpeg repeats columns before it averages, but rows only up to whole averages, and the averages afterwards
        plane = padded(planes[:, component], up(layout.height, down), columns * across)
        blocks = to_blocks(padded(integer_average(plane, (down, across)), rows, columns) - 128)
        steps = 8 * tables[:, component].view(-1, 1, 1, BLOCK, BLOCK).to(blocks)
        scaled = integer_dct(blocks)
        coefficients.append(scaled.sign() * ((scaled.abs() + steps / 2).floor() / steps).floor())
    return coefficients
