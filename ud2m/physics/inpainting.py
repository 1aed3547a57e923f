"""Inpainting: masks of random pixels, boxes and strokes, and the user's own."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepinv
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ud2m.numbers import is_whole
from ud2m.physics.data_term import Prox, prepared_prox
from ud2m.physics.family import FixedOperator, OperatorFamily
from ud2m.physics.immutable import Immutable
from ud2m.physics.rows import at_least_float32, per_sample
from ud2m.random import Generators, rand
from ud2m.raster import is_array, read_collection, read_numbers, read_picture


class PixelMask(Immutable, deepinv.physics.Inpainting):
    """A = diag(mask): known pixels are kept, missing ones are 0.

    deepinv's ``Inpainting``, but for: no state; images keep their dtype; the prox (deepinv's divides 0 by 0
    at missing pixels when gamma is infinite).

    Args:
        mask: 1 where measured, 0 where missing; [1 or B, 1 or C, H, W].
        image_shape: (C, H, W).
        device: where the operator lives.

    Raises:
        ValueError: for a mask of another shape, not binary, or with every pixel missing in some sample.
    """

    per_sample = ("mask",)

    def __init__(self, mask: Tensor, image_shape: tuple[int, int, int], device: torch.device | str = "cpu"):
        channels, height, width = image_shape
        if mask.ndim != 4 or mask.shape[1] not in (1, channels) or mask.shape[2:] != (height, width):
            raise ValueError(f"the mask must be [1 or B, 1 or {channels}, {height}, {width}], got {list(mask.shape)}")
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("the mask must be binary: 1 where a pixel is measured, 0 where it is missing")
        if not mask.flatten(1).any(dim=1).all():
            raise ValueError("the mask measures nothing in at least one sample: every pixel is missing")
        super().__init__(img_size=tuple(image_shape), mask=mask.float(), device=device)

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return mask x."""
        self.update_parameters(**kwargs)
        if x.shape[-2:] != self.mask.shape[-2:]:
            raise ValueError(f"the mask is for {list(self.mask.shape[-2:])} pixels, got {list(x.shape)}")
        return self.mask.to(x.dtype) * x

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return A^T y = A y."""
        return self.A(y, **kwargs)

    def A_dagger(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return A^dagger y = A y."""
        return self.A(y, **kwargs)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float, **kwargs: Any) -> Tensor:
        """Return argmin_u gamma |A u - y|^2 / 2 + |u - z|^2 / 2 = z + mask (y - z) / (1 + 1 / gamma).

        ``gamma``: number, or tensor of one element, [B] or [B, 1, 1, 1]; infinity is allowed.
        """
        self.update_parameters(**kwargs)
        dtype = at_least_float32(z, y)
        return self.prepared(y.to(dtype))(gamma)(z.to(dtype)).to(z.dtype)

    def prepared(self, y: Tensor) -> Prox:
        """Return ``prepared_prox`` for y in float32 or float64."""
        mask = self.mask.to(y.dtype)

        def weighted(gamma: Tensor | float) -> Callable[[Tensor], Tensor]:
            step = mask / (1 + 1 / per_sample(gamma, y))
            return lambda z: torch.lerp(z, y, step)

        return weighted


@prepared_prox.register
def _(physics: PixelMask, y: Tensor) -> Prox:
    return physics.prepared(y.to(at_least_float32(y)))


class RandomMask(OperatorFamily):
    """y = mask x, all channels together, another mask for every sample."""

    random = True

    @abstractmethod
    def masks(self, batch_size: int, size: tuple[int, int], generator: Generators) -> Tensor:
        """Return B independent masks [B, 1, H, W], true where a pixel is measured."""

    def draw(
        self,
        batch_size: int,
        image_shape: tuple[int, int, int],
        generator: Generators = None,
        device: torch.device | str = "cpu",
    ) -> PixelMask:
        """Return B independent masks."""
        self.check(image_shape)
        return PixelMask(self.masks(batch_size, image_shape[1:], generator), image_shape, device)


class Inpainting(RandomMask):
    """Pixels are missing at random.

    Args:
        missing: probability that a pixel is missing, inside (0, 1); two numbers: another one for every sample, uniform
            between them. At least one pixel is always measured.

    Raises:
        ValueError: when ``missing`` is not inside (0, 1).
    """

    def __init__(self, missing: float | Sequence[float] = 0.7):
        low, high = missing if isinstance(missing, Sequence) else (missing, missing)
        if not 0 < low <= high < 1:
            raise ValueError(f"missing (share of unmeasured pixels) must be inside (0, 1), got {missing}")
        self.missing = (float(low), float(high))

    def masks(self, batch_size: int, size: tuple[int, int], generator: Generators) -> Tensor:
        """Return independent masks; the pixel of the highest score is measured whatever happens."""
        score = rand((batch_size, 1, *size), generator)
        low, high = self.missing
        missing = low if low == high else low + (high - low) * rand((batch_size, 1, 1, 1), generator)
        return score >= score.amax((-2, -1), keepdim=True).clamp(max=missing)


class MissingBoxes(RandomMask):
    """Rectangles are missing, at random places.

    Args:
        side: height and width of a rectangle as a share of the image's, inside (0, 1).
        count: rectangles per image, which may overlap.

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(self, side: float = 0.5, count: int = 1):
        if not 0 < side < 1 or not is_whole(count) or count < 1:
            raise ValueError(
                f"side (share of the image's height and width) must be inside (0, 1) and count at least 1, got {side} "
                f"and {count!r}"
            )
        self.side, self.count = side, count

    def masks(self, batch_size: int, size: tuple[int, int], generator: Generators) -> Tensor:
        """Return masks without the boxes; where several cover everything, only the first is left."""
        place = rand((batch_size, self.count, 2), generator)
        covered = [self._covered(place[..., axis], length) for axis, length in enumerate(size)]
        boxes = covered[0].unsqueeze(-1) & covered[1].unsqueeze(-2)  # [B, count, H, W]
        missing = boxes.any(1, keepdim=True)
        full = missing.flatten(1).all(1).view(-1, 1, 1, 1)
        return ~torch.where(full, boxes[:, :1], missing)

    def _covered(self, place: Tensor, length: int) -> Tensor:
        """Return which of ``length`` pixels of an axis each box covers, [B, count, length]."""
        extent = min(max(1, round(self.side * length)), max(1, length - 1))
        first = (place * (length - extent + 1)).long().unsqueeze(-1)
        pixel = torch.arange(length)
        return (pixel >= first) & (pixel < first + extent)


class MissingStrokes(RandomMask):
    """Brush strokes are missing: bent lines of random places, widths and lengths, until a share is covered.

    Free-form masks as in Yu et al., "Free-form image inpainting with gated convolution", ICCV 2019.

    Args:
        share: lowest and highest share of missing pixels, inside (0, 0.9]; each mask aims at its own in between, and
            passes it by its last stroke.

    Raises:
        ValueError: for shares out of range.
    """

    def __init__(self, share: Sequence[float] = (0.2, 0.3)):
        low, high = share
        if not 0 < low <= high <= 0.9:
            raise ValueError(
                f"share (lowest and highest share of missing pixels) must rise inside (0, 0.9], got {share}"
            )
        self.share = (float(low), float(high))

    def masks(self, batch_size: int, size: tuple[int, int], generator: Generators) -> Tensor:
        """Return masks without the strokes."""
        seeds = (rand((batch_size, 1), generator)[:, 0].double() * 2**24).long().tolist()
        return torch.stack([self._mask(np.random.default_rng(seed), size) for seed in seeds]).unsqueeze(1)

    def _mask(self, rng: np.random.Generator, size: tuple[int, int]) -> Tensor:
        canvas = Image.new("1", (size[1], size[0]), 1)
        target, before = rng.uniform(*self.share), canvas
        while np.mean(np.array(canvas)) > 1 - target:
            before = canvas.copy()
            draw_stroke(canvas, rng)
        painted = np.array(canvas)
        return torch.from_numpy(painted if painted.any() else np.array(before))


def draw_stroke(canvas: Image.Image, rng: np.random.Generator) -> None:
    """Paint one bent line of zeros with round joints, about a third of the image long."""
    width, height = canvas.size
    scale = min(width, height)
    brush = max(1, round(scale * rng.uniform(0.03, 0.1)))
    point, angle = rng.uniform((0, 0), (width, height)), rng.uniform(0, 2 * np.pi)
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(2, 6)):
        angle += rng.uniform(-1, 1)
        end = point + scale * rng.uniform(0.05, 0.15) * np.array([np.cos(angle), np.sin(angle)])
        pen.line([*point, *end], fill=0, width=brush)
        pen.ellipse([*(end - brush / 2), *(end + brush / 2)], fill=0)
        point = end


class MaskFile(FixedOperator):
    """y = mask x with the user's own mask: white is measured, black is missing; of a ``.npy`` file, 1 and 0.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not an image, has pixels that are neither black nor white (levels 97 to 159 of 255 in
            some channel, or channels that disagree), or nothing white.
    """

    def __init__(self, path: str | Path):
        self.mask = read_mask(Path(path))[None, None]

    def operator(self, image_shape: tuple[int, int, int], device: torch.device | str) -> PixelMask:
        """Return the mask, the same for all samples."""
        return PixelMask(self.mask, image_shape, device)

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError for images of another size than the mask."""
        super().check(image_shape)
        if tuple(image_shape[1:]) != tuple(self.mask.shape[2:]):
            raise ValueError(
                f"the mask has {self.mask.shape[2]}x{self.mask.shape[3]} pixels (height x width), the image "
                f"{image_shape[1]}x{image_shape[2]}; they must be equal"
            )


def read_mask(path: Path) -> Tensor:
    """Return a mask [H, W], true where a pixel is measured (see ``MaskFile``)."""
    name = f"the mask {path}"
    if is_array(path):
        values = read_numbers(path, name)
        known, unclear = values.reshape(*values.shape, 1) == 1, ~np.isin(values, (0, 1))
        found = f"values {_some(values)}; 1 is measured, 0 is missing"
    else:
        levels = read_picture(path, name)
        share = levels / np.iinfo(levels.dtype).max
        known = share > 0.5
        unclear = ((share > 96 / 255) & (share < 160 / 255)).any(-1) | (known != known[..., :1]).any(-1)
        found = f"levels {_some(levels)} of {np.iinfo(levels.dtype).max}; white is measured, black is missing"
    if known.ndim != 3 or not known.size:
        raise ValueError(f"{name} must be a matrix [H, W], got shape {list(known.shape[:-1])}")
    if unclear.any():
        share_of_them = 100 * float(np.mean(unclear))
        raise ValueError(
            f"{name} must be black and white, {share_of_them:.3g} % of its pixels are grey or coloured: it has {found}"
        )
    if not known.any():
        raise ValueError(
            f"every pixel is missing in {name}: it has {found}. Scale a mask of 0 and 1 by 255, and paint palettes of "
            "labels black and white"
        )
    return torch.from_numpy(known[..., 0])


def _some(values: np.ndarray) -> str:
    """Return the numbers that occur, a few of them if there are many."""
    found = np.unique(values)
    return ", ".join(f"{value:g}" for value in found[:6]) + (f" ... {found[-1]:g}" if len(found) > 6 else "")


class MaskCollection(RandomMask):
    """One of many stored masks for every sample, as Palette's free-form masks, which I2SB uses too.

    Args:
        path: an ``.npz`` file whose arrays hold masks of ``size`` x ``size`` pixels as packed bits, 1 where a pixel is
            missing.
        key: name of the array, e.g. ``"20-30% freeform"``.
        size: side of the masks in pixels.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no such file or has no such array.
    """

    def __init__(self, path: str | Path, key: str = "20-30% freeform", size: int = 256):
        names, packed = read_collection(Path(path), key, f"the collection of masks {path}")
        if packed is None:
            raise ValueError(f"{path} has no masks named {key!r}; choose one of {', '.join(names)}")
        bits = packed.reshape(-1)
        self.size, self.count = size, bits.size * 8 // size**2
        if packed.dtype != np.uint8 or self.count < 1:
            raise ValueError(f"{path} does not hold masks of {size}x{size} pixels as packed bits under {key!r}")
        self.bits = bits

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError for images of another size than the masks."""
        super().check(image_shape)
        if tuple(image_shape[1:]) != (self.size, self.size):
            raise ValueError(f"the masks have {self.size}x{self.size} pixels, got {image_shape[1]}x{image_shape[2]}")

    def masks(self, batch_size: int, size: tuple[int, int], generator: Generators) -> Tensor:
        """Return B masks of the collection."""
        numbers = (rand((batch_size, 1), generator)[:, 0] * self.count).long().clamp(max=self.count - 1).tolist()
        pixels = self.size**2
        chosen = [np.unpackbits(self.bits[n * pixels // 8 : -(-(n + 1) * pixels // 8)]) for n in numbers]
        holes = [bits[n * pixels % 8 :][:pixels] for n, bits in zip(numbers, chosen, strict=True)]
        return torch.from_numpy(np.stack(holes)).view(batch_size, 1, *size) == 0
