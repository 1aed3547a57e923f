"""Videos of MNIST digits that move at constant velocity and bounce off the borders."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import MNIST

from ud2m.data.mnist import NUMBERS, MnistData, captions_of
from ud2m.data.module import Split, captioned

SPLITS: tuple[Split, ...] = ("train", "val", "test")


class MovingDigitsData(MnistData):
    """``data=moving_digits``: the splits of ``MnistData``, each digit as a video float32 [1, T, side, side] in [0, 1].

    The video of a digit is a function of (seed, split, its number) alone: see ``MovingDigits``.

    Args:
        frames: T.
        speed: most pixels per frame, along each axis.
        common: the arguments of ``MnistData``.

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(self, frames: int = 9, speed: int = 2, **common: Any):
        super().__init__(**common)
        if frames < 1 or speed < 1:
            raise ValueError(f"moving digits need frames >= 1 and speed >= 1 pixel, got {frames} and {speed}")
        self.frames, self.speed = frames, speed

    def all_captions(self) -> Sequence[str]:
        """Return what the captions of the training digits say."""
        captions = [captions_of(label, "video") for label in range(len(NUMBERS))]
        return captions if self.captions else super().all_captions()

    def state_dict(self) -> dict[str, Any]:
        """Return what decides the training batches."""
        return super().state_dict() | {"frames": self.frames, "speed": self.speed}

    def _digits(self, mnist: MNIST, part: slice, split: Split) -> "MovingDigits":
        captions = [captions_of(label, "video") for label in mnist.targets[part].tolist()] if self.captions else None
        return MovingDigits(mnist.data[part], self.crop_size, split, self.frames, self.speed, self.seed, captions)


class MovingDigits(Dataset[Any]):
    """Videos [1, T, side, side] of digits uint8 [N, 28, 28], on black.

    Of each digit the rows and columns with ink move over the picture. Along each axis the place p in {0, ..., R}, R the
    room that is left, and the velocity v in {-speed, ..., speed} are drawn uniformly, without 0 along both: a clip that
    stands still has no motion to be judged. Frame t has the digit at R - |R - (p + v t) mod 2R|, whole pixels: a
    constant velocity with elastic bounces.

    Args:
        digits: see above.
        side: of the frames in pixels.
        split: decides the motions, with ``seed`` and the number of the digit.
        frames: T.
        speed: see above.
        seed: see above.
        captions: of the digits, if any.
    """

    def __init__(
        self,
        digits: Tensor,
        side: int,
        split: Split,
        frames: int,
        speed: int,
        seed: int = 0,
        captions: Sequence[str] | None = None,
    ):
        self.digits, self.side, self.frames, self.speed, self.captions = digits, side, frames, speed, captions
        self.origin = [seed, SPLITS.index(split)]
        self.names = [f"{split}-{k:05d}" for k in range(len(digits))]

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> Any:
        ink = trimmed(self.digits[index])
        video = torch.zeros(1, self.frames, self.side, self.side)
        for t, (top, left) in enumerate(self.places(index, ink.shape)):
            video[0, t, top : top + ink.shape[0], left : left + ink.shape[1]] = ink.float() / 255
        return captioned(video, self.captions, index)

    def places(self, index: int, size: Sequence[int]) -> list[tuple[int, int]]:
        """Return row and column [T] of the upper left corner of a digit of this size."""
        rng = np.random.default_rng([*self.origin, index])
        times, axes = np.arange(self.frames), []
        steps = range(-self.speed, self.speed + 1)
        velocities = [velocity for velocity in product(steps, steps) if any(velocity)]
        for extent, velocity in zip(size, velocities[rng.integers(len(velocities))], strict=True):
            room = self.side - extent
            place = rng.integers(room + 1)
            axes.append(room - np.abs(room - (place + velocity * times) % max(2 * room, 1)))
        return [(int(row), int(column)) for row, column in zip(*axes, strict=True)]


def trimmed(digit: Tensor) -> Tensor:
    """Return a digit [H, W] without the rows and columns at its borders that have no ink."""
    rows, columns = (digit.any(axis).nonzero().flatten() for axis in (1, 0))
    return digit[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1] if len(rows) else digit
