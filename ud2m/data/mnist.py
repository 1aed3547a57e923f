"""MNIST, padded with black to the size of the training images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset
from torchvision.datasets import MNIST

from ud2m.data.module import ImageDataModule, NamedImages, Split, captioned

SIDE = 28
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VALIDATION = 1000  # the last of the 60000 training digits
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class MnistData(ImageDataModule):
    """``data=mnist``: trains on 59000 digits, validates on the 1000 after them, tests on 10000 others.

    Args:
        root: folder that holds ``MNIST/raw`` with the four files; what is missing is downloaded into it.
        captions: items are pairs of a digit and its captions, one a line, as ``captions_of`` has them.
        common: the arguments of ``ImageDataModule``; ``channels`` must be 1, ``tile_size`` that of the crops,
            and ``crop_size`` 28 or a larger even number.
    """

    def __init__(self, root: str | Path, captions: bool = False, **common: Any):
        super().__init__(**common)
        if self.channels != 1:
            raise ValueError(f"data=mnist is grey: channels must be 1, got {self.channels}")
        if self.crop_size < SIDE or self.crop_size % 2 or self.tile_size != self.crop_size:
            raise ValueError(
                f"digits are padded from {SIDE}x{SIDE}: crop_size must be an even number from {SIDE} on and "
                f"tile_size equal to it, got {self.crop_size} and {self.tile_size}"
            )
        self.root, self.captions = Path(root).expanduser(), captions

    def prepare_data(self) -> None:
        """Download in one process, before the others look for the files."""
        read_mnist(self.root, train=True)

    def train_set(self) -> Dataset[Any]:
        """Return the first 59000 training digits."""
        return self._digits(read_mnist(self.root, train=True), slice(None, -VALIDATION), "train")

    def all_images(self, split: Split) -> NamedImages:
        """Return the last 1000 training digits or the test digits."""
        if split == "test":
            return self._digits(read_mnist(self.root, train=False), slice(None), "test")
        return self._digits(read_mnist(self.root, train=True), slice(-VALIDATION, None), "val")

    def all_captions(self) -> Sequence[str]:
        """Return what the captions of the training digits say."""
        return super().all_captions() if not self.captions else [captions_of(label) for label in range(len(NUMBERS))]

    def _digits(self, mnist: MNIST, part: slice, split: Split) -> Any:
        captions = [captions_of(label) for label in mnist.targets[part].tolist()] if self.captions else None
        return Digits(mnist.data[part], self.crop_size, split, captions)


def captions_of(label: int, medium: str = "photo") -> str:
    """Return the captions of a digit, one a line; three in four say which it is."""
    return "\n".join([f"a {medium} of the digit {NUMBERS[label]}"] * 3 + [f"a {medium} of a digit"])


class Digits(Dataset[Any]):
    """Digits uint8 [N, 28, 28] as float32 [1, side, side] in [0, 1], centred on black; with its captions, if any."""

    def __init__(self, digits: Tensor, side: int, split: Split, captions: Sequence[str] | None = None):
        self.digits, self.margin, self.captions = digits, (side - SIDE) // 2, captions
        self.names = [f"{split}-{k:05d}" for k in range(len(digits))]

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> Any:
        return captioned(pad(self.digits[index][None].float() / 255, (self.margin,) * 4), self.captions, index)


def read_mnist(root: Path, train: bool) -> MNIST:
    """Return the training or test digits, ``data`` uint8 [N, 28, 28] and ``targets`` [N]; downloaded if missing.

    Raises:
        FileNotFoundError: when the files are missing and cannot be downloaded.
        ValueError: when a file is damaged.
    """
    folder = root / "MNIST" / "raw"
    if not all((folder / name).is_file() for name in FILES):
        download_mnist(root)
    try:
        return MNIST(str(root), train=train)
    except (OSError, RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise ValueError(
            f"a file in {folder} is damaged ({one_line(error)}): delete the folder or copy the files anew"
        ) from error


def download_mnist(root: Path) -> None:
    """Download MNIST into ``root/MNIST/raw``.

    Raises:
        FileNotFoundError: when this fails; the message says which files to put where.
    """
    try:
        MNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"MNIST is not in {root / 'MNIST' / 'raw'} and cannot be downloaded ({one_line(error)}); "
            f"put {', '.join(FILES)} there, or set data.root to the folder that contains MNIST/raw"
        ) from error


def one_line(error: Exception) -> str:
    """Return the message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
