"""The user's own folder of images."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import Dataset

from ud2m.bars import progress_bar
from ud2m.data.augmentation import Augmentation
from ud2m.data.captions import read_captions
from ud2m.data.crops import PROBABILITIES, SCALES, RandomCrops, Tiles
from ud2m.data.module import ImageDataModule, NamedImages, Split
from ud2m.images import image_files, read_image
from ud2m.listing import Listing, listed, none_left
from ud2m.raster import is_array, read_header

SPLITS: tuple[Split, ...] = ("train", "val", "test")
SHARE = 0.1  # of validation and of test files


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
        captions: items are pairs of a crop and the text of ``NAME.txt`` beside its file: captions, one a line.
        skip_broken: read all files before the training starts, and leave out and list those that cannot be.
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
        captions: bool = False,
        skip_broken: bool = False,
        **common: Any,
    ):
        super().__init__(**common)
        self.root = Path(root).expanduser()
        self.scales, self.probabilities = tuple(scales), tuple(probabilities)
        self.augmentation, self.candidates = Augmentation(**(augment or {})), candidates
        self.cache_bytes, self.captions = cache_mb * 2**20, captions
        self.skip_broken, self._whole = skip_broken, dict[Split, list[str]]()
        self._told: set[Path] = set()

    def train_set(self) -> Dataset[Tensor]:
        """Return endless crops of the training files."""
        images = self._images("train")
        return RandomCrops(
            images,
            self.crop_size,
            self.seed,
            self.scales,
            self.probabilities,
            augmentation=self.augmentation,
            candidates=self.candidates,
            cache_bytes=self.cache_bytes,
            captions=self._captions(images),
        )

    def all_images(self, split: Split) -> NamedImages:
        """Return the tiles of the files of a split."""
        images = self._images(split)
        return Tiles(images, self.tile_size, self.cache_bytes, self._captions(images))

    def _images(self, split: Split) -> "FolderImages":
        found = find_images(folder_of(self.root, split))
        if found.folder not in self._told:
            self._told.add(found.folder)
            rank_zero_only(print)(found, flush=True)
        names = names_of(self.root, split, found)
        if self.skip_broken and split not in self._whole:  # once: it may take minutes
            self._whole[split] = whole(self.root, names)
        return FolderImages(self.root, self._whole.get(split, names), self.channels)

    def all_captions(self) -> Sequence[str]:
        """Return the captions of the training files."""
        return self._captions(self._images("train")) or super().all_captions()

    def _captions(self, images: "FolderImages") -> list[str] | None:
        return [read_captions(self.root / name) for name in images.names] if self.captions else None


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


def whole(root: Path, names: Sequence[str]) -> list[str]:
    """Return those of some files that can be read as images, and print the list of the others.

    Raises:
        ValueError: when none can.
    """
    kept, broken = [], []
    for name in progress_bar(names, desc="checking", disable=None):
        try:
            read_image(root / name, None)
            kept.append(name)
        except ValueError as error:
            broken.append(str(error))
    if broken:
        rank_zero_only(print)(listed(broken), flush=True)
    if not kept:
        raise ValueError(none_left(broken))
    return kept


def files_of(root: Path, split: Split) -> list[str]:
    """Return the image files of one split as sorted names relative to ``root``.

    Raises:
        FileNotFoundError: when the folder, or the subfolder of the split, does not exist.
        NotADirectoryError: when it is a file.
        ValueError: when it holds no images, or too few to be split.
    """
    return names_of(root, split, find_images(folder_of(root, split)))


def folder_of(root: Path, split: Split) -> Path:
    """Return the folder that the files of a split lie in, perhaps with those of others."""
    return root / split if any((root / name).is_dir() for name in SPLITS) else root


def names_of(root: Path, split: Split, found: Listing) -> list[str]:
    """Return the names, relative to ``root``, of the files of a split in its ``folder_of``."""
    if found.folder == root:
        return split_files(found.names, root)[split]
    return [f"{split}/{name}" for name in found.names]


def find_images(folder: Path) -> Listing:
    """Return the image files below ``folder``, as ``image_files`` finds them.

    Raises:
        FileNotFoundError: when there is no such folder.
        NotADirectoryError: when it is a file.
        ValueError: when it holds no image.
    """
    if not folder.exists():
        raise FileNotFoundError(f"no such folder of images: {folder} (looked in {Path.cwd()}); set data.root")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; data.root must be a folder of images")
    return image_files(folder, below=True)


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
    if is_array(path):
        image = read_image(path)
        return image.shape[1], image.shape[2]
    header = read_header(path, path)
    return header.height, header.width
