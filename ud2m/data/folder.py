"""The user's own folder of images."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ud2m.data.augmentation import Augmentation
from ud2m.data.crops import PROBABILITIES, SCALES, RandomCrops, Tiles
from ud2m.data.module import ImageDataModule, NamedImages, Split
from ud2m.images import read_image
from ud2m.raster import SUFFIXES, opened

SPLITS: tuple[Split, ...] = ("train", "val", "test")
SHARE = 0.1  # of validation and of test files
ORIENTATION = 0x0112  # EXIF tag; values from 5 on swap width and height


class FolderData(ImageDataModule):
    """``data=folder``: trains on random crops of the user's images, validates and tests on tiles of others.

    Args:
        root: folder of images of any sizes, searched with all its subfolders. If it has a subfolder
            ``train``, ``val`` or ``test``, these are the splits; otherwise `split_files` splits the files.
        scales: pyramid levels of the training crops.
        probabilities: their shares (see ``RandomCrops``).
        augment: keyword arguments of ``Augmentation``.
        candidates: places per crop (see ``RandomCrops``).
        cache_mb: memory per process for decoded images, in MiB.
        common: the arguments of ``ImageDataModule``; ``channels`` 1 turns colour into grey, 3 repeats grey.
    """

    def __init__(
        self,
        root: str | Path,
        scales: Sequence[float] = SCALES,
        probabilities: Sequence[float] = PROBABILITIES,
        augment: Mapping[str, float] | None = None,
        candidates: int = 1,
        cache_mb: int = 512,
        **common: Any,
    ):
        super().__init__(**common)
        self.root = Path(root).expanduser()
        self.scales, self.probabilities = tuple(scales), tuple(probabilities)
        self.augmentation, self.candidates = Augmentation(**(augment or {})), candidates
        self.cache_bytes = cache_mb * 2**20

    def train_set(self) -> Dataset[Tensor]:
        """Return endless crops of the training files."""
        images = FolderImages(self.root, files_of(self.root, "train"), self.channels)
        return RandomCrops(
            images,
            self.crop_size,
            self.seed,
            self.scales,
            self.probabilities,
            augmentation=self.augmentation,
            candidates=self.candidates,
            cache_bytes=self.cache_bytes,
        )

    def all_images(self, split: Split) -> NamedImages:
        """Return the tiles of the files of a split."""
        images = FolderImages(self.root, files_of(self.root, split), self.channels)
        return Tiles(images, self.tile_size, self.cache_bytes)


class FolderImages:
    """An ``ImageStore`` of image files: sizes are read at once, pixels when asked for.

    Raises:
        ValueError: when a file is no image.
    """

    def __init__(self, root: Path, files: Sequence[str], channels: int):
        self.root, self.names, self.channels = root, list(files), channels
        self.sizes = [image_size(root / name) for name in files]

    def load(self, index: int) -> Tensor:
        """Read one file."""
        path = self.root / self.names[index]
        image = read_image(path, self.channels)
        if tuple(image.shape[1:]) != self.sizes[index]:
            raise ValueError(
                f"{path} is {image.shape[2]}x{image.shape[1]} pixels, not as its header says or as it was "
                "when the folder was read; save it again"
            )
        return image


def files_of(root: Path, split: Split) -> list[str]:
    """Return the image files of one split as sorted names relative to ``root``.

    Raises:
        FileNotFoundError: when the folder, or the subfolder of the split, does not exist.
        NotADirectoryError: when it is a file.
        ValueError: when it holds no images, or too few to be split.
    """
    if any((root / name).is_dir() for name in SPLITS):
        return [f"{split}/{name}" for name in find_images(root / split)]
    return split_files(find_images(root), root)[split]


def find_images(folder: Path) -> list[str]:
    """Return the names of all image files below ``folder``, relative to it and sorted, without hidden ones.

    Raises:
        FileNotFoundError: when there is no such folder.
        NotADirectoryError: when it is a file.
        ValueError: when it holds no image.
    """
    if not folder.exists():
        raise FileNotFoundError(f"no such folder of images: {folder} (looked in {Path.cwd()}); set data.root")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; data.root must be a folder of images")
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    found = sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))
    if not found:
        raise ValueError(f"no image below {folder}; expected files that end in {', '.join(SUFFIXES)}")
    return found


def split_files(names: Sequence[str], root: Path) -> dict[Split, list[str]]:
    """Split files by the SHA-256 of their names, as a number in [0, 1).

    Below 0.1: test, from there to 0.2: val, above: train, so that files which are added later do not move the
    others. In a small folder, where these could be empty, val and test get one file each, those of the lowest
    numbers.

    Raises:
        ValueError: for fewer than three files.
    """
    if len(names) < 3:
        raise ValueError(
            f"{len(names)} images below {root} cannot be split into training, validation and test: "
            "at least 3 are needed, or subfolders train, val and test"
        )
    order = sorted(names, key=hash_of)
    tests = max(1, sum(hash_of(name) < SHARE for name in names))
    validations = max(1, sum(SHARE <= hash_of(name) < 2 * SHARE for name in names))
    held_out = tests + validations
    return {
        "test": sorted(order[:tests]),
        "val": sorted(order[tests:held_out]),
        "train": sorted(order[held_out:]),
    }


def hash_of(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def image_size(path: Path) -> tuple[int, int]:
    """Return height and width of the upright image, from the file's header where the format allows.

    Raises:
        ValueError: when the file is no image.
    """
    if path.suffix.lower() == ".npy":
        return _height_and_width(read_image(path))
    with opened(path, path) as image:
        # Pillow decodes a whole PNG to look for EXIF data behind the pixels, where hardly any file has it
        is_late = image.format == "PNG" and "exif" not in image.info
        is_turned = not is_late and image.getexif().get(ORIENTATION, 1) >= 5
        return (image.width, image.height) if is_turned else (image.height, image.width)


def _height_and_width(image: Tensor) -> tuple[int, int]:
    return image.shape[1], image.shape[2]
