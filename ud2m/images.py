"""Image files in and out, as float tensors [C, H, W] in [0, 1]."""

import base64
import io
import math
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ud2m.files import write_bytes
from ud2m.listing import Listing, list_files
from ud2m.raster import LIMIT, SUFFIXES, is_array, max_pixels, read_header, read_numbers, read_picture

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601), what PNG and JPEG tools call grey."""

MEASURED_RANGE = (-0.5, 1.5)
"""Noise takes a measurement out of [0, 1], but not this far."""
_PROFILES = {1: b"GRAY", 3: b"RGB "}
"""What bytes 16 to 19 of a colour profile say, by the channels of the pixels that it is of [ICC.1:2022, table 19]."""


@dataclass(frozen=True)
class PixelFormat:
    """How the pixels of a file are to be understood.

    Args:
        bits: per channel, 8 or 16.
        profile: ICC colour profile, as the file holds it; None: none.
    """

    bits: int = 8
    profile: bytes | None = None


def most_pixels(default: int | None = None) -> int:
    """Return the largest number of pixels of a picture that is read (``ud2m.raster.max_pixels``).

    Args:
        default: holds from now on, where the environment gives none.

    Raises:
        ValueError: when the environment gives what is no number.
    """
    if default is not None:
        os.environ.setdefault(LIMIT, str(default))
    return max_pixels()


def list_images(path: str | Path) -> list[Path]:
    """Return the image files that ``path`` names: itself, or those in a folder, sorted, as ``image_files`` finds them.

    Raises:
        FileNotFoundError: when the path does not exist.
        ValueError: when the folder holds no image.
    """
    path = _existing(path)
    return [path / name for name in image_files(path, below=False).names] if path.is_dir() else [path]


def image_files(folder: Path, below: bool) -> Listing:
    """Return the image files of a folder (see ``list_files``), and with ``below`` those of all its subfolders.

    Raises:
        ValueError: when there is none.
    """
    found = list_files(folder, SUFFIXES, below)
    if not found.names:
        where = f"below {folder}" if below else f"in the folder {folder} (subfolders are not searched)"
        passed = f", passed over: {found.others}" if found.passed else ""
        raise ValueError(f"no image {where}; expected files that end in {', '.join(SUFFIXES)}{passed}")
    return found


def read_image(path: str | Path, channels: int | None = 3) -> Tensor:
    """Read an image file: float32 [C, H, W] in [0, 1].

    PNG (8 and 16 bit, grey, palette or colour), JPEG, WebP and BMP are understood by content, not by name,
    and turned upright by their orientation in EXIF or XMP. An alpha channel is dropped where it is opaque and refused
    where it is not: no background would be right for every use. A file of several pictures is refused. Colour profiles
    are not applied (``pixel_format``).

    ``.npy`` files hold floats [H, W], [H, W, C] or [C, H, W] in [0, 1]; they keep noise that an 8-bit file
    would clip, hence values a little outside pass (down to -0.5 and up to 1.5). Other numbers of channels than 1 and 3
    come from them alone, as [C, H, W]; complex [H, W] are two.

    Args:
        path: the file.
        channels: 3 repeats grey; 1 takes the luma 0.299 R + 0.587 G + 0.114 B of colour; None keeps what the
            file has, and another number must be its own.

    Raises:
        FileNotFoundError: when there is no such file.
        IsADirectoryError: when it is a folder.
        ValueError: when it is no image, is damaged, has transparent pixels or values outside the range, or more pixels
            than the environment variable ``UD2M_MAX_PIXELS`` allows.
    """
    path = _existing(path)
    return with_channels(_read_npy(path, channels) if is_array(path) else _unit(read_picture(path, path)), channels)


def decode_image(data: bytes, name: str | Path, channels: int | None = 3) -> Tensor:
    """Return the image in the bytes of a PNG, JPEG, WebP or BMP file as ``read_image`` does.

    Args:
        data: the whole file.
        name: what messages call it.
        channels: as in ``read_image``.

    Raises:
        ValueError: as ``read_image``.
    """
    return with_channels(_unit(read_picture(data, name)), channels)


def pixel_format(path: str | Path) -> PixelFormat:
    """Return depth and colour profile of an image file that ``read_image`` has read; ``.npy`` counts as 16 bit.

    Numbers are the profile's own, unchanged by ``read_image``: what is made of them has the same profile.
    """
    if is_array(path):
        return PixelFormat(16)
    header = read_header(Path(path), path)
    return PixelFormat(header.bits, header.profile)


def write_image(image: Tensor, path: str | Path, pixels: PixelFormat | None = None) -> None:
    """Write [C, H, W] (C = 1 or 3) as a PNG, atomically; values are clamped to [0, 1]. Default: 8 bit, no profile.

    A profile of another colour space than the pixels have, as of colour for grey, is left out.

    Raises:
        ValueError: when the name does not end in ``.png``, the shape is no image or a value is not finite.
        OSError: when the place cannot be written or the disk is full.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"images are written as PNG, got the name {path}; let it end in .png")
    write_bytes(path, to_png_bytes(image, pixels))


def to_png_bytes(image: Tensor, pixels: PixelFormat | None = None) -> bytes:
    """Encode [C, H, W] (C = 1 or 3) as a PNG; values are clamped to [0, 1] and rounded to k / (2^bits - 1).

    Raises:
        ValueError: when the shape is no image or a value is not finite.
    """
    pixels = pixels or PixelFormat()
    levels = _levels(image, pixels.bits)
    profile = pixels.profile if pixels.profile and pixels.profile[16:20] == _PROFILES[image.shape[0]] else None
    if pixels.bits == 16:
        return _deep_png(levels.astype(">u2"), profile)
    buffer = io.BytesIO()
    _eight_bits(levels).save(buffer, format="PNG", icc_profile=profile)
    return buffer.getvalue()


def eight_bits(image: Tensor) -> Image.Image:
    """Return [C, H, W] (C = 1 or 3) as a picture of Pillow; values are clamped to [0, 1] and rounded to k / 255.

    Raises:
        ValueError: as ``to_png_bytes``.
    """
    return _eight_bits(_levels(image, 8))


def _eight_bits(levels: np.ndarray) -> Image.Image:
    array = levels.astype(np.uint8)
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _levels(image: Tensor, bits: int) -> np.ndarray:
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"an image to be written has shape [1 or 3, H, W], got {list(image.shape)}")
    values = image.detach().float().cpu()
    if not values.isfinite().all():
        raise ValueError("an image to be written holds NaN or infinite values; see what made it")
    levels: np.ndarray = (values.double().clamp(0, 1) * (2**bits - 1)).round().permute(1, 2, 0).numpy()
    return levels


def viewable(values: Tensor) -> tuple[Tensor, str]:
    """Return any numbers as a picture [1 or 3, h, w] in [0, 1], and what was done to them.

    An image with 1 or 3 channels is clamped. Anything else, as a sinogram or a complex image, is scaled from its
    smallest to its largest value; of several channels it is the modulus. Coils [C, N, h, w] stand side by side, and
    vectors are folded.
    """
    planes = _folded(values.detach().float().cpu())
    low, high = float(planes.min()), float(planes.max())
    if values.ndim == 3 and len(planes) in (1, 3) and low >= MEASURED_RANGE[0] and high <= MEASURED_RANGE[1]:
        return planes.clamp(0, 1), ""
    size = planes.norm(dim=0, keepdim=True) if len(planes) > 1 else planes
    low, high = float(size.min()), float(size.max())
    what = "modulus over channels, " if len(planes) > 1 else ""
    return (size - low) / max(high - low, 1e-12), f"; {what}black {low:.3g}, white {high:.3g}"


def write_values(values: Tensor, path: Path, pixels: PixelFormat | None = None) -> None:
    """Write any numbers as the picture that ``viewable`` makes of them; if that is not them, as ``.npy`` beside it.

    Raises:
        OSError: as ``write_image``.
    """
    picture, remark = viewable(values)
    write_image(picture, path, pixels)
    if remark:
        buffer = io.BytesIO()
        np.save(buffer, values.detach().float().cpu().numpy())
        write_bytes(path.with_suffix(".npy"), buffer.getvalue())


def _folded(values: Tensor) -> Tensor:
    if values.ndim == 3:
        return values
    if values.ndim == 4:
        return torch.cat(list(values.unbind(1)), dim=-1)
    side = math.ceil(values.numel() ** 0.5)
    rows = -(-values.numel() // side)
    return F.pad(values.flatten(), (0, rows * side - values.numel())).view(1, rows, side)


def data_url(image: Image.Image, quality: int | None = None) -> str:
    """Return a picture as the source of an image inside an HTML page: WebP of a quality up to 100; None: PNG."""
    buffer, kind = io.BytesIO(), "png" if quality is None else "webp"
    image.save(buffer, format=kind, quality=quality)  # PNG knows no quality
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def moving_url(frames: Sequence[Image.Image], milliseconds: int, quality: int | None = None) -> str:
    """Return pictures of one size that follow one another for ever as ``data_url``: WebP; None: without loss."""
    buffer, first, *others = io.BytesIO(), *frames
    lossless = {"lossless": True} if quality is None else {"quality": quality}
    first.save(buffer, "webp", save_all=True, append_images=others, duration=milliseconds, loop=0, **lossless)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _deep_png(levels: np.ndarray, profile: bytes | None) -> bytes:
    # Pillow and torchvision write 8 bits per colour; the container itself is four chunks [PNG specification, section 5]
    height, width, channels = levels.shape
    rows = np.hstack([np.zeros((height, 1), np.uint8), levels.reshape(height, -1).view(np.uint8)])  # no filter
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0 if channels == 1 else 2, 0, 0, 0))]
    if profile is not None:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(profile)))
    chunks += [(b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    framed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def std_scale(std: Tensor) -> float:
    """Return a readable upper end for a map of standard deviations [C, H, W], in image units.

    The 99.5 % quantile over pixels of the mean over channels, rounded up to two digits: a single outlier
    does not darken the rest. At least one grey level (1 / 255): rounding noise must not look like structure.

    Raises:
        ValueError: when a value is not finite.
    """
    value = max(float(np.quantile(_channel_mean(std).numpy(), 0.995)), 1 / 255)
    digit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / digit - 1e-9) * digit:.2g}")


def std_image(std: Tensor, scale: float | None = None) -> tuple[Tensor, float]:
    """Colour a map of standard deviations [C, H, W] for viewing.

    The mean over channels, divided by ``scale`` and clamped to [0, 1], goes through matplotlib's ``inferno``:
    black is 0, the pale yellow at its end is ``scale`` or more.

    Args:
        std: standard deviations in image units.
        scale: what the end of the colours means; by default `std_scale` of the map itself.

    Returns:
        The picture [3, H, W] and the scale, which belongs in the caption.

    Raises:
        ValueError: when ``scale`` is not positive or a value of the map is not finite.
    """
    scale = std_scale(std) if scale is None else scale
    if not scale > 0:
        raise ValueError(f"the scale of a map of standard deviations must be positive, got {scale}")
    values = (_channel_mean(std) / scale).clamp(0, 1)
    colours = matplotlib.colormaps["inferno"](values.numpy())[..., :3]
    return torch.from_numpy(colours).permute(2, 0, 1).float(), scale


def _channel_mean(std: Tensor) -> Tensor:
    if not std.isfinite().all():
        raise ValueError("the standard deviations hold NaN or infinite values (a single sample has none)")
    return std.detach().float().mean(0).cpu()


def _existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path} (looked in {Path.cwd()})")
    return path


def _unit(levels: np.ndarray) -> Tensor:
    planes = np.ascontiguousarray(levels.transpose(2, 0, 1), dtype=np.float32)
    return torch.from_numpy(planes).div_(np.iinfo(levels.dtype).max)


def _read_npy(path: Path, channels: int | None) -> Tensor:
    array = read_numbers(path, path)
    if channels == 2 and array.ndim == 2 and np.iscomplexobj(array):
        array = np.stack([array.real, array.imag])
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path} holds {array.dtype} values; expected floats in [0, 1] (8 bit: divide by 255)")
    values = _planes(array, path, channels)
    if not np.isfinite(values).all():
        raise ValueError(f"{path} holds NaN or infinite values; replace them (a mask says what is missing)")
    low, high = float(values.min()), float(values.max())
    if low < MEASURED_RANGE[0] or high > MEASURED_RANGE[1]:
        raise ValueError(
            f"{path} holds values from {low:g} to {high:g}; expected about [0, 1]: "
            "divide 8-bit values by 255, map [-1, 1] to [0, 1]"
        )
    return torch.from_numpy(values.astype(np.float32))


def _planes(array: np.ndarray, path: Path, channels: int | None) -> np.ndarray:
    if array.ndim == 3 and len(array) == channels:
        return np.ascontiguousarray(array)
    if array.ndim == 2:
        planes = array[None]
    elif array.ndim == 3 and array.shape[2] in (1, 3):
        planes = array.transpose(2, 0, 1)
    else:
        planes = array
    if planes.ndim != 3 or planes.shape[0] not in (1, 3) or 0 in planes.shape:
        raise ValueError(f"{path} has shape {array.shape}; expected (H, W), (H, W, C) or (C, H, W), C = 1 or 3")
    return np.ascontiguousarray(planes)


def noise_factor(image: Tensor, channels: int) -> float:
    """Return what ``with_channels`` does to the deviation of independent noise: less in a mean of channels.

    Args:
        image: [C, H, W].
        channels: of the result.

    Equal channels have one noise, whose mean is no less.
    """
    if len(image) <= channels or bool((image == image[:1]).all()):
        return 1.0
    return math.hypot(*LUMINANCE)


def with_channels(image: Tensor, channels: int | None) -> Tensor:
    """Return [C, H, W] with so many channels, as ``read_image`` does."""
    if channels is None or channels == len(image):
        return image
    if channels not in (1, 3) or len(image) not in (1, 3):
        raise ValueError(
            f"a picture of {len(image)} channels is none of {channels}; give a .npy file [{channels}, H, W]"
        )
    if channels == 3:
        return image.expand(3, -1, -1).contiguous()
    return torch.einsum("chw,c->hw", image, torch.tensor(LUMINANCE))[None]
