"""Pictures and arrays in files: what is opened at all, and how large it may be, before memory is taken for it.

Imports nothing heavy: ``data_prep/make_shards.py`` starts a process per core with it.
"""

import io
import math
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base

from ud2m.png import HEADER, deep_levels, may_be_turned, png_header, whole_png

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""What is decoded. Pillow knows more, some of which start programs, as Ghostscript for EPS."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".npy")

LIMIT, DEFAULT_LIMIT = "UD2M_MAX_PIXELS", 100_000_000
"""Environment variable with the largest number of pixels of a picture; its default takes about 2 GB to decode."""
BYTES_PER_PIXEL, VALUES_PER_PIXEL = 8, 4
"""Four channels of 16 bits; a file or an array that needs more than these is too large."""
_HEADER = 2**14
"""Bytes in which the header of an array must end; numpy's own limit is 10000 characters."""
_STORED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DAMAGED = (
    ArithmeticError,
    AssertionError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
)
"""What Pillow, numpy and zipfile raise for damaged files."""

_PILLOW = threading.Lock()


class RefusedError(ValueError):
    """A whole file has what is not taken, as too many pixels; the message says what."""


def max_pixels() -> int:
    """Return the largest number of pixels of a picture.

    Raises:
        ValueError: when the environment variable is no number.
    """
    text = os.environ.get(LIMIT) or str(DEFAULT_LIMIT)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{LIMIT}, the largest number of pixels of a picture, is a whole number, got {text!r}")
    return int(text)


def check_file(path: Path) -> None:
    """Raise an OSError or ValueError for a path that is no ordinary file, or for a file that no picture can fill."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not an image file; name one file in it")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path} (looked in {Path.cwd()})")
    if not path.is_file():
        raise ValueError(f"{path} is no ordinary file, but a pipe or device; name a file")


def read_file(path: Path) -> bytes:
    """Return the bytes of a file that can be a picture.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is no ordinary file, or longer than any picture.
    """
    check_file(path)
    size, most = path.stat().st_size, BYTES_PER_PIXEL * max_pixels()
    if size > most:
        raise ValueError(f"{path} is too large: {size} bytes, at most {most} for {LIMIT}={max_pixels()}")
    return path.read_bytes()


def open_limited(source: Path | bytes) -> Image.Image:
    """Return a picture of ``FORMATS`` whose header has been read, and none of its pixels.

    Raises:
        RefusedError: when there are too many.
        OSError: and others of Pillow, for what is no such picture.
    """
    most = max_pixels()
    with _PILLOW:  # its own limit warns, and cannot be set for one picture
        theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = theirs
    if image.width * image.height > most:
        image.close()
        raise RefusedError(
            f"too many pixels: {image.width}x{image.height}, at most {most} are decoded; cut it into pieces, or set "
            f"the environment variable {LIMIT}"
        )
    return image


@dataclass(frozen=True)
class Header:
    """What a picture says of itself before a pixel is decoded.

    Attributes:
        format: of Pillow's names; "MPO" is a JPEG with further pictures.
        height: in pixels, upright.
        width: in pixels, upright.
        bits: per channel, 8 or 16.
        orientation: EXIF's 1 to 8, of the pixels as they are stored.
        profile: ICC colour profile; None: none.
    """

    format: str
    height: int
    width: int
    bits: int
    orientation: int
    profile: bytes | None


def read_header(source: Path | bytes, name: str | Path) -> Header:
    """Return what a picture says of itself; of a file little more than its beginning is read.

    Args:
        source: file, or all its bytes.
        name: what messages call it.

    Raises:
        OSError: for a path that cannot be read.
        ValueError: for what is no picture, too large, or damaged.
    """
    if isinstance(source, Path):
        check_file(source)
    with _opened(source, name) as image, io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        bits = png_header(file.read(HEADER)).bits if image.format == "PNG" else 8
        turned = _orientation(image, file)
        height, width = (image.width, image.height) if turned >= 5 else (image.height, image.width)
        return Header(image.format or "", height, width, max(8, bits), turned, image.info.get("icc_profile"))


def read_picture(source: Path | bytes, name: str | Path) -> np.ndarray:
    """Return all that a picture shows, upright, or refuse it: uint8 or uint16 [H, W, C], C = 1 (grey) or 3.

    What would be lost is refused: further pictures, transparent pixels, missing rows. Colour profiles are not applied.

    Args:
        source: file, or all its bytes.
        name: what messages call it.

    Raises:
        OSError: for a path that cannot be read.
        ValueError: for what is no picture, too large, damaged, or shows more than these levels.
    """
    data = read_file(source) if isinstance(source, Path) else source
    with _opened(data, name) as image:
        return decode(image, data)


def decode(image: Image.Image, data: bytes) -> np.ndarray:
    """Return the levels of a picture that ``open_limited`` has opened, as ``read_picture`` does.

    Raises:
        RefusedError: for what would be lost.
        OSError: and others of Pillow, for damaged files.
    """
    count = _pictures(image, data)
    if count > 1:
        raise RefusedError(f"{count} pictures in it; save the one that is meant as a file of its own")
    levels, opaque = _levels(image, data)
    if not opaque:
        raise RefusedError("transparent pixels; flatten it onto the background that it should have")
    return np.ascontiguousarray(upright(levels, _orientation(image, io.BytesIO(data))))


def upright(levels: np.ndarray, orientation: int) -> np.ndarray:
    """Return [H, W, C] turned and mirrored as an EXIF orientation of 1 to 8 asks for [TIFF 6.0, section 8]."""
    sides = levels.swapaxes(0, 1) if orientation >= 5 else levels
    # then the first row is at the bottom, the first column at the right
    down = -1 if orientation in (3, 4, 7, 8) else 1
    right = -1 if orientation in (2, 3, 6, 7) else 1
    return sides[::down, ::right]


@contextmanager
def _opened(source: Path | bytes, name: str | Path) -> Iterator[Image.Image]:
    """Yield a picture as ``open_limited`` does; what goes wrong in the block too becomes a line that names the file."""
    with _telling(name, "is truncated or damaged"):
        image = open_limited(source)
    with image, _telling(name, f"is a truncated or damaged {image.format} file"):
        yield image


def _levels(image: Image.Image, data: bytes) -> tuple[np.ndarray, bool]:
    """Return the levels of a picture as they are stored, and whether it is opaque."""
    if image.format == "PNG":
        whole = whole_png(data)
        if whole.header.bits == 16:
            return deep_levels(whole)
    opaque = not image.has_transparency_data or image.convert("RGBA").getchannel("A").getextrema()[0] == 255
    grey = image.mode in ("1", "L", "LA")
    levels = np.array(image.convert("L" if grey else "RGB"))
    return levels[..., None] if grey else levels, opaque


def _orientation(image: Image.Image, file: IO[bytes]) -> int:
    # of a PNG that says none in front, Pillow decodes all pixels to look behind them
    if image.format == "PNG" and not may_be_turned(file):
        return 1
    orientation: Any = image.getexif().get(Base.Orientation)
    return int(orientation) if orientation in range(1, 9) else 1


def _pictures(image: Image.Image, data: bytes) -> int:
    """Return how many pictures of equal right a file holds: those of a JPEG that are smaller are previews and maps."""
    count = int(getattr(image, "n_frames", 1))
    if image.format != "MPO":
        return count
    with open_limited(data) as other:  # which is led from one to the next
        sizes = [image.size]
        for number in range(1, count):
            other.seek(number)
            sizes.append(other.size)
        return sizes.count(image.size)


def is_array(path: str | Path) -> bool:
    """Return whether a file is an array by its name, in any case of letters."""
    return Path(path).suffix.lower() == ".npy"


def read_numbers(path: Path, name: str | Path) -> np.ndarray:
    """Return the array of a ``.npy`` file. Its size is known from its header, before memory is taken.

    Args:
        path: the file.
        name: what messages call it.

    Raises:
        OSError: for a path that cannot be read.
        ValueError: for what is no array of numbers, damaged, cut or too large.
    """
    check_file(path)
    with path.open("rb") as stream, _telling(name, "is not a whole .npy file of numbers"):
        return _array(stream, path.stat().st_size)


def read_collection(path: Path, key: str, name: str | Path) -> tuple[list[str], np.ndarray | None]:
    """Return the names of the arrays of a ``.npz`` file, and that called ``key``, as ``read_numbers`` does.

    Raises:
        OSError: as ``read_numbers``.
        ValueError: as ``read_numbers``.
    """
    check_file(path)
    with _telling(name, "is not a whole .npz file of numbers"), zipfile.ZipFile(path) as archive:
        found = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        return list(found), _member(archive, found[key]) if key in found else None


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    if info.compress_type not in _STORED:
        raise ValueError(f"{info.filename} is compressed in another way than numpy does")
    with archive.open(info) as stream:
        return _array(stream, info.file_size)


def _array(stream: IO[bytes], length: int) -> np.ndarray:
    shape, dtype, start = _header(io.BytesIO(stream.read(_HEADER)))
    values, most = math.prod(shape), VALUES_PER_PIXEL * max_pixels()
    if min(shape, default=0) < 0 or dtype.hasobject or dtype.kind not in "biufc":
        raise ValueError(f"it holds {dtype} values of shape {shape}, expected numbers")
    if values * dtype.itemsize > length - start:
        raise ValueError(f"its header says {values * dtype.itemsize} bytes of {dtype}, and {length - start} are there")
    if values > most:
        raise RefusedError(f"too many values: shape {shape}, at most {most} for {LIMIT}={max_pixels()}")
    stream.seek(0)
    array = np.lib.format.read_array(stream, allow_pickle=False)
    return array.astype(array.dtype.newbyteorder("="), copy=False)  # torch knows no other order


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, int]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"arrays of numbers have version 1.0 or 2.0, this one {version}")
    return shape, dtype, stream.tell()


@contextmanager
def _telling(name: str | Path, fault: str) -> Iterator[None]:
    """Turn errors of damaged files into lines that name them."""
    try:
        yield
    except RefusedError as error:
        raise ValueError(f"{name} has {error}") from error
    except UnidentifiedImageError as error:
        expected = f"expected {', '.join(FORMATS)} or floats in a .npy file"
        raise ValueError(f"{name} is not an image that can be read; {expected}") from error
    except (*_DAMAGED, TypeError, TokenError, zipfile.BadZipFile, zlib.error, struct.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} {fault}: {reason}") from error
