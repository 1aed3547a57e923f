"""Data sets of clean images: photographs inside installed packages, MNIST, and the user's own folder or shards."""

from ud2m.data.folder import FolderData
from ud2m.data.mnist import MnistData
from ud2m.data.module import ImageDataModule
from ud2m.data.moving_digits import MovingDigitsData
from ud2m.data.photos import PhotoData
from ud2m.data.shards import ShardData

__all__ = ["FolderData", "ImageDataModule", "MnistData", "MovingDigitsData", "PhotoData", "ShardData"]
