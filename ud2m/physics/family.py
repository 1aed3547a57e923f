"""What a training run or a user asks for operators."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from ud2m.physics.data_term import DataTerm
from ud2m.random import Generators


class OperatorFamily(ABC):
    """A kind of operator whose members are drawn per batch.

    A new operator is one subclass and one YAML under ``conf/physics``. ``random`` says whether draws differ, so that
    an observation made elsewhere cannot be explained by another draw. Heights and widths of images must be multiples of
    ``multiple``. ``video`` says whether it acts on videos (C, T, H, W).
    """

    random: bool = False
    multiple: int = 1
    video: bool = False

    @abstractmethod
    def draw(
        self,
        batch_size: int,
        image_shape: tuple[int, int, int],
        generator: Generators = None,
        device: torch.device | str = "cpu",
    ) -> DataTerm:
        """Return an operator for a batch of images.

        It is immutable: per-sample parameters, [B, ...], belong to it for good, and no call changes it. The
        same generator state gives the same operator.

        Args:
            batch_size: B.
            image_shape: (C, H, W).
            generator: source of randomness, on any device, or one per sample; None uses torch's global one.
            device: where the operator's tensors live.

        Raises:
            ValueError: as ``check``.
        """

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError where images (C, H, W) cannot be taken; subclasses add their own conditions."""
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape must be (C, H, W) with positive entries, got {tuple(image_shape)}")

    def image_shape(self, y_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Return (C, H, W) of the images whose observations have the shape ``y_shape``; by default the same."""
        return y_shape

    def y_channels(self, channels: int) -> int:
        """Return the channels of observations of images with ``channels`` channels; by default as many."""
        return channels

    def of_scene(self) -> "OperatorFamily":
        """Return the family for observations of a scene that goes on beyond the picture; by default this one."""
        return self

    def read_observation(
        self, path: str | Path, channels: int, device: torch.device | str
    ) -> tuple[Tensor, DataTerm] | None:
        """Return y [1, ...] and its operator from a file that says both; None, the default: the file is a picture y.

        Args:
            path: the user's file.
            channels: of the unknown image.
            device: for both results.

        Raises:
            ValueError: for a file that this family cannot read.
        """
        return None


class FixedOperator(OperatorFamily):
    """A family with a single member: nothing about it is random, and all samples share it."""

    @abstractmethod
    def operator(self, image_shape: tuple[int, int, int], device: torch.device | str) -> DataTerm:
        """Return the operator for images (C, H, W) that ``check`` has passed."""

    def draw(
        self,
        batch_size: int,
        image_shape: tuple[int, int, int],
        generator: Generators = None,
        device: torch.device | str = "cpu",
    ) -> DataTerm:
        """Return the operator."""
        self.check(image_shape)
        return self.operator(image_shape, device)
