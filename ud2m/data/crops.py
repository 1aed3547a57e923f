"""Cut training crops and test tiles out of whole images."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from ud2m.data.augmentation import Augmentation
from ud2m.data.image_store import ImageStore
from ud2m.data.module import captioned

SCALES = (1.0, 0.71, 0.5, 0.35, 0.25)
PROBABILITIES = (0.5, 0.15, 0.15, 0.1, 0.1)


class RandomCrops(Dataset[Any]):
    """Endless random crops: item i >= 0 is a pure function of (images, settings, seed, i).

    Workers, ranks and resumed runs therefore see the same crops whenever they ask for the same numbers. An
    item is: an image (by weight), a level of its pyramid (by probability), a place, a left-right flip in half
    of the cases, and what ``augmentation`` makes of it.

    Args:
        images: the images to cut from.
        crop_size: side of the crops in pixels.
        seed: every seed is another endless sequence.
        scales: pyramid levels as factors in (0, 1] of the image size; an image skips the levels that are
            smaller than the crop.
        probabilities: the share of each level.
        weights: relative share of each image; equal by default.
        augmentation: further random changes; none by default.
        candidates: places drawn per crop, of which the one with the most ``detail`` is taken. Half of many photographs
            is smooth background, which teaches little.
        cache_bytes: memory for decoded images and levels, kept while recently used; None keeps everything.
        captions: of each image; items are pairs of a crop and the caption of its image then.

    Returns (per item):
        float32 [C, crop_size, crop_size] in [0, 1].

    Raises:
        ValueError: for images smaller than the crop (listed), for no images, and for impossible settings.
    """

    def __init__(
        self,
        images: ImageStore,
        crop_size: int,
        seed: int = 0,
        scales: Sequence[float] = SCALES,
        probabilities: Sequence[float] = PROBABILITIES,
        weights: Sequence[float] | None = None,
        augmentation: Augmentation | None = None,
        candidates: int = 1,
        cache_bytes: int | None = None,
        captions: Sequence[str] | None = None,
    ):
        check_levels(scales, probabilities)
        check_sizes(images, crop_size)
        check_candidates(candidates)
        self.pyramid = Pyramid(images, cache_bytes)
        self.crop_size, self.seed, self.candidates = crop_size, seed, candidates
        self.augmentation, self.captions = augmentation or Augmentation(), captions
        self.choices, self.cumulative = choices(images.sizes, crop_size, scales, probabilities, weights)
        if cache_bytes is None:  # once here rather than once per worker
            for image, scale in self.choices:
                self.pyramid.level(image, scale)

    def __getitem__(self, index: int) -> Any:
        rng = np.random.default_rng([self.seed, index])
        which, flip = rng.random(2)
        image, scale = self.choices[int(np.searchsorted(self.cumulative, which, side="right"))]
        level = self.pyramid.level(image, scale)
        crop = detailed_crop(level, self.crop_size, self.candidates, rng)
        crop = crop.flip(2) if flip < 0.5 else crop.clone()  # never a view of the kept image
        return captioned(self.augmentation(crop, rng), self.captions, image)


class Tiles(Dataset[Any]):
    """All non-overlapping tiles of all images, row by row from the top left, without remainders at the edges.

    ``names[i]`` is like ``chelsea-r0-c3``. Items are float32 [C, tile_size, tile_size] in [0, 1], with the caption of
    their image where there are captions.

    Raises:
        ValueError: when there are no images or some are smaller than a tile.
    """

    def __init__(
        self,
        images: ImageStore,
        tile_size: int,
        cache_bytes: int | None = None,
        captions: Sequence[str] | None = None,
    ):
        check_sizes(images, tile_size)
        self.pyramid, self.tile_size, self.captions = Pyramid(images, cache_bytes), tile_size, captions
        self.places = [
            (image, row, column)
            for image, (height, width) in enumerate(images.sizes)
            for row in range(height // tile_size)
            for column in range(width // tile_size)
        ]
        self.names = [f"{images.names[image]}-r{row}-c{column}" for image, row, column in self.places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        image, row, column = self.places[index]
        top, left = row * self.tile_size, column * self.tile_size
        whole = self.pyramid.level(image, 1.0)
        tile = whole[:, top : top + self.tile_size, left : left + self.tile_size].clone()
        return captioned(tile, self.captions, image)


class Pyramid:
    """Images at reduced sizes, resized when first asked for and then kept."""

    def __init__(self, images: ImageStore, cache_bytes: int | None = None):
        self.images, self.cache_bytes = images, cache_bytes
        self.kept: OrderedDict[tuple[int, float], Tensor] = OrderedDict()
        self.kept_bytes = 0

    def level(self, image: int, scale: float) -> Tensor:
        """Return image number ``image`` at ``scale``, float32 [C, H, W] in [0, 1]."""
        key = (image, scale)
        if key not in self.kept:
            whole_size = scale == 1
            self._keep(key, self.images.load(image) if whole_size else downscale(self.level(image, 1.0), scale))
        self.kept.move_to_end(key)
        return self.kept[key]

    def _keep(self, key: tuple[int, float], value: Tensor) -> None:
        self.kept[key] = value
        self.kept_bytes += value.nbytes
        while self.cache_bytes is not None and self.kept_bytes > self.cache_bytes and len(self.kept) > 1:
            self.kept_bytes -= self.kept.popitem(last=False)[1].nbytes


def detailed_crop(level: Tensor, side: int, candidates: int, rng: np.random.Generator) -> Tensor:
    """Return a view of a random square of [C, H, W]: of so many candidates the one with the most ``detail``."""
    places = (rng.random(2) for _ in range(candidates))
    return max((_crop(level, side, down, right) for down, right in places), key=detail)


def _crop(level: Tensor, side: int, down: float, right: float) -> Tensor:
    top, left = int(down * (level.shape[1] - side + 1)), int(right * (level.shape[2] - side + 1))
    return level[:, top : top + side, left : left + side]


def detail(image: Tensor) -> float:
    """Return the mean square difference of neighbouring pixels of [C, H, W]."""
    return sum(image.diff(dim=axis).square().mean().item() for axis in (1, 2))


def downscale(image: Tensor, scale: float) -> Tensor:
    """Return [C, H, W] at ``scale``: antialiased bicubic, clamped to [0, 1] as bicubic overshoots."""
    size = scaled_size(image.shape[1:], scale)
    return interpolate(image[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    """Return height and width of a level in pixels."""
    return round(size[0] * scale), round(size[1] * scale)


def choices(
    sizes: Sequence[tuple[int, int]],
    crop_size: int,
    scales: Sequence[float],
    probabilities: Sequence[float],
    weights: Sequence[float] | None = None,
) -> tuple[list[tuple[int, float]], np.ndarray]:
    """Return all (image, scale) with room for a crop, and the cumulative distribution over them.

    P(image) is proportional to its weight, P(scale | image) to the probabilities of the levels with room.
    """
    pairs, masses = [], []
    for image, size in enumerate(sizes):
        room = [k for k, scale in enumerate(scales) if min(scaled_size(size, scale)) >= crop_size]
        share = (1.0 if weights is None else weights[image]) / sum(probabilities[k] for k in room)
        pairs += [(image, float(scales[k])) for k in room]
        masses += [share * probabilities[k] for k in room]
    cumulative = np.cumsum(masses) / np.sum(masses)
    cumulative[-1] = 1.0
    return pairs, cumulative


def check_levels(scales: Sequence[float], probabilities: Sequence[float]) -> None:
    """Raise ValueError unless scales lie in (0, 1], 1 among them, each with a positive probability."""
    if 1.0 not in scales or min(scales) <= 0 or max(scales) > 1:
        raise ValueError(f"scales must lie in (0, 1] and contain 1.0, got {list(scales)}")
    if len(probabilities) != len(scales) or min(probabilities) <= 0:
        raise ValueError(
            f"probabilities must be positive, one per scale ({len(scales)}), got {list(probabilities)}; "
            "to leave a level out, remove it from both lists"
        )


def check_candidates(candidates: int) -> None:
    """Raise ValueError unless a crop is chosen from at least one place."""
    if candidates < 1:
        raise ValueError(f"candidates, the places drawn per crop, must be at least 1, got {candidates}")


def check_sizes(images: ImageStore, side: int) -> None:
    """Raise ValueError when there are no images or some are smaller than ``side`` pixels."""
    if side < 1:
        raise ValueError(f"crops and tiles must be at least 1 pixel wide, got {side}")
    if not images.names:
        raise ValueError("there are no images to cut crops or tiles from")
    small = [
        f"{name} ({width}x{height})"
        for name, (height, width) in zip(images.names, images.sizes, strict=True)
        if min(height, width) < side
    ]
    if small:
        more = f" and {len(small) - 10} more" if len(small) > 10 else ""
        raise ValueError(
            f"images smaller than {side}x{side} pixels ({len(small)}): {', '.join(small[:10])}{more}; "
            "remove them or choose a smaller crop_size or tile_size"
        )
