"""Real colour photographs that installed wheels contain: a data set without any download."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ud2m.data.augmentation import Augmentation
from ud2m.data.crops import PROBABILITIES, SCALES, RandomCrops, Tiles
from ud2m.data.image_store import MemoryImages
from ud2m.data.module import ImageDataModule, NamedImages, Split
from ud2m.raster import read_picture


@dataclass(frozen=True)
class Photo:
    """One photograph: its package, how to load it, its side of the split, licence and training weight."""

    name: str
    package: str
    load: Callable[[], Any]
    split: Split
    licence: str
    weight: float = 1.0


def _skimage(name: str) -> Callable[[], Any]:
    def load() -> Any:
        import skimage.data

        return getattr(skimage.data, name)()

    return load


def _motorcycle(camera: int) -> Callable[[], Any]:
    return lambda: _skimage("stereo_motorcycle")()[camera]  # the third item is a disparity map


def _sklearn(file: str) -> Callable[[], Any]:
    def load() -> Any:
        from sklearn.datasets import load_sample_image

        return load_sample_image(file)

    return load


def _grace_hopper() -> Any:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return read_picture(path, path)


# Pictures of no everyday scene (sky, eye, tissue) weigh a quarter; two views of one scene share its weight.
PHOTOS = (
    Photo("astronaut", "scikit-image", _skimage("astronaut"), "train", "public domain (NASA)"),
    Photo("motorcycle_left", "scikit-image", _motorcycle(0), "train", "Middlebury 2014 stereo", 0.5),
    Photo("motorcycle_right", "scikit-image", _motorcycle(1), "train", "Middlebury 2014 stereo", 0.5),
    Photo("rocket", "scikit-image", _skimage("rocket"), "train", "public domain (SpaceX)"),
    Photo("flower", "scikit-learn", _sklearn("flower.jpg"), "train", "CC BY 2.0 (danielbuechele)"),
    Photo("grace_hopper", "matplotlib", _grace_hopper, "train", "matplotlib's"),
    Photo("hubble", "scikit-image", _skimage("hubble_deep_field"), "train", "public domain (NASA)", 0.25),
    Photo("retina", "scikit-image", _skimage("retina"), "train", "CC0", 0.25),
    Photo("ihc", "scikit-image", _skimage("immunohistochemistry"), "train", "no known restrictions", 0.25),
    Photo("china", "scikit-learn", _sklearn("china.jpg"), "val", "CC BY 2.0 (danielbuechele)"),
    Photo("chelsea", "scikit-image", _skimage("chelsea"), "test", "CC0 (Stefan van der Walt)"),
    Photo("coffee", "scikit-image", _skimage("coffee"), "test", "CC0 (Rachel Michetti)"),
)

# Versions whose wheels are known to contain the files.
KNOWN = {"scikit-image": "0.26", "scikit-learn": "1.9", "matplotlib": "3.10"}


def load_photos(split: Split) -> dict[str, Tensor]:
    """Return the photographs of one split by name, uint8 [3, H, W].

    Raises:
        ValueError: for an unknown split.
        FileNotFoundError: when an installed package lacks its photograph.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split must be train, val or test, got {split!r}")
    return {photo.name: load_photo(photo) for photo in PHOTOS if photo.split == split}


def load_photo(photo: Photo) -> Tensor:
    """Return one photograph, uint8 [3, H, W].

    Raises:
        FileNotFoundError: when the installed package lacks it.
    """
    try:
        pixels = photo.load()
    except Exception as error:  # packages fail in different ways, up to an attempt to download
        raise FileNotFoundError(
            f"the photograph {photo.name} is missing from the installed {photo.package} ({error}); it is in "
            f"the wheels of version {KNOWN[photo.package]}: pip install --force-reinstall {photo.package}"
        ) from error
    return torch.from_numpy(np.array(pixels, dtype=np.uint8)).permute(2, 0, 1).contiguous()


class PhotoData(ImageDataModule):
    """``data=photos``: trains on crops, validates on tiles of china, tests on tiles of chelsea and coffee.

    Args:
        scales: pyramid levels of the training crops.
        probabilities: their shares (see ``RandomCrops``).
        augment: keyword arguments of ``Augmentation``.
        candidates: places per crop (see ``RandomCrops``).
        common: the arguments of ``ImageDataModule``; ``channels`` must be 3.
    """

    def __init__(
        self,
        scales: Sequence[float] = SCALES,
        probabilities: Sequence[float] = PROBABILITIES,
        augment: Mapping[str, float] | None = None,
        candidates: int = 1,
        **common: Any,
    ):
        super().__init__(**common)
        if self.channels != 3:
            raise ValueError(f"data=photos is in colour: channels must be 3, got {self.channels}")
        self.scales, self.probabilities = tuple(scales), tuple(probabilities)
        self.augmentation, self.candidates = Augmentation(**(augment or {})), candidates

    def train_set(self) -> Dataset[Tensor]:
        """Return endless crops of the training photographs."""
        weights = [photo.weight for photo in PHOTOS if photo.split == "train"]
        images = MemoryImages(load_photos("train"))
        return RandomCrops(
            images,
            self.crop_size,
            self.seed,
            self.scales,
            self.probabilities,
            weights,
            self.augmentation,
            self.candidates,
        )

    def all_images(self, split: Split) -> NamedImages:
        """Return the tiles of the photographs of a split."""
        return Tiles(MemoryImages(load_photos(split)), self.tile_size)
