"""Data sets of clean images: photographs inside installed packages, MNIST, and the user's own folder."""

from ud2m.data.folder import FolderData
from ud2m.data.mnist import MnistData
from ud2m.data.module import ImageDataModule
from ud2m.data.photos import PhotoData

__all__ = ["FolderData", "ImageDataModule", "MnistData", "PhotoData"]
