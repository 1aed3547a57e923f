"""Collections of whole images that crops and tiles are cut from."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class ImageStore(Protocol):
    """Images that are known by name and size before they are loaded."""

    @property
    def names(self) -> list[str]:
        """One name per image, unique."""
        ...

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each image in pixels."""
        ...

    def load(self, index: int) -> Tensor:
        """Return image number ``index``, float32 [C, H, W] in [0, 1]."""
        ...


class MemoryImages:
    """An ``ImageStore`` of uint8 tensors [C, H, W] that are already loaded."""

    def __init__(self, images: Mapping[str, Tensor]):
        self.names = list(images)
        self.images = list(images.values())
        self.sizes = [(image.shape[1], image.shape[2]) for image in self.images]

    def load(self, index: int) -> Tensor:
        """Return the image divided by 255."""
        return self.images[index].float() / 255
