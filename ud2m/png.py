"""PNG beyond what Pillow looks at: whether rows are missing, 16 bits of colour, and what stands behind the pixels.

Pillow takes a stream that ends too early as whole, its last rows black, and keeps 8 bits of colours. Decoders that keep
16 die of a segmentation fault on damaged files. Sections are those of the PNG specification, third edition.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
from PIL import Image

HEADER = 29
"""Bytes of the signature and the first chunk."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Values per pixel of each colour type (section 11.2.1): grey, colour, palette, grey and alpha, colour and alpha."""
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row of each pass of an interlaced picture, and the steps from there (section 8.1)."""
_DESCRIPTIONS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
"""What texts that hold an orientation begin with."""
_PIECE = 2**14
"""Bytes that are decompressed at once, to a thousand times as many at most."""


@dataclass(frozen=True)
class PngHeader:
    """The first chunk of a PNG."""

    width: int
    height: int
    bits: int
    colour: int
    interlaced: bool

    @property
    def channels(self) -> int:
        """Values per pixel."""
        return CHANNELS[self.colour]

    @property
    def length(self) -> int:
        """Bytes of all rows before compression: one says how a row is filtered, then come its pixels."""
        passes = ADAM7 if self.interlaced else ((0, 0, 1, 1),)
        sides = ((-(-(self.width - x) // right), -(-(self.height - y) // down)) for x, y, right, down in passes)
        return sum(h * (1 + -(-w * self.channels * self.bits // 8)) for w, h in sides if w > 0 and h > 0)


@dataclass(frozen=True)
class Png:
    """The parts of a whole file: its header, compressed rows, and the transparent colour, where there is one."""

    header: PngHeader
    rows: bytes
    transparent: bytes


def chunks(stream: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Yield kind and length of each chunk up to the last; the stream then stands at its data.

    Raises:
        ValueError: when the last one is missing.
    """
    place, kind = len(SIGNATURE), b""
    while kind != b"IEND":
        stream.seek(place)
        head = stream.read(8)
        if len(head) < 8:
            raise ValueError("it ends before its last chunk")
        length, kind = struct.unpack(">I4s", head)
        yield kind, length
        place += 12 + length


def may_be_turned(stream: IO[bytes]) -> bool:
    """Return whether some chunk, which may stand behind the pixels, says how the picture is to be turned."""
    return any(
        kind == b"eXIf" or (kind in (b"iTXt", b"tEXt", b"zTXt") and stream.read(32).startswith(_DESCRIPTIONS))
        for kind, _ in chunks(stream)
    )


def png_header(data: bytes) -> PngHeader:
    """Return the header in the first ``HEADER`` bytes of a PNG.

    Raises:
        ValueError: when it is none.
    """
    if not data.startswith(SIGNATURE) or data[12:16] != b"IHDR" or len(data) < HEADER:
        raise ValueError("it does not begin with a header")
    width, height, bits, colour, compression, filters, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    if not (width and height) or bits not in DEPTHS.get(colour, ()) or compression or filters or interlace > 1:
        raise ValueError(
            f"its header says {width}x{height} pixels of {bits} bits, colour type {colour}, methods {compression}, "
            f"{filters} and {interlace}, which no PNG has"
        )
    return PngHeader(width, height, bits, colour, bool(interlace))


def whole_png(data: bytes) -> Png:
    """Return the parts of a file whose checksums are right and whose rows are all there, of a length that is known.

    Raises:
        ValueError: for a damaged or cut file, and for one with too few or too many rows.
    """
    header, stream = png_header(data), io.BytesIO(data)
    rows: list[bytes] = []
    transparent = before = b""
    for kind, length in chunks(stream):
        body, checksum = stream.read(length), stream.read(4)
        if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(checksum, "big"):
            raise ValueError(f"the checksum of its chunk {kind.decode('ascii', 'backslashreplace')} is wrong")
        if (kind == b"IHDR" and before) or (kind == b"IDAT" and rows and before != b"IDAT"):
            raise ValueError("its chunks do not follow each other as they must")
        if kind == b"IDAT":
            rows.append(body)
        elif kind == b"tRNS":
            transparent = body
        before = kind
    whole = b"".join(rows)
    found = _inflated_length(whole, header.length)
    if found != header.length:
        raise ValueError(
            f"its header says {header.length} bytes of rows, and {'more' if found > header.length else found} are there"
        )
    return Png(header, whole, transparent)


def deep_levels(png: Png) -> tuple[np.ndarray, bool]:
    """Return the levels of a whole file of 16 bits, uint16 [H, W, 1 or 3] without alpha, and whether it is opaque.

    Pillow undoes the filters of its rows, in bytes: with two of them per value it can, as of pictures with two channels
    of 8 bits, or, where there is no such mode, of the high and of the low bytes in turn.

    Raises:
        ValueError: when a row says a filter that there is not.
    """
    if png.header.channels == 1:
        levels = _bytes(png, "LA", "LA").view(">u2")
    elif png.header.channels == 2:
        levels = _bytes(png, "RGBA", "RGBA").view(">u2")
    else:
        mode = "RGB" if png.header.channels == 3 else "RGBA"
        levels = _bytes(png, mode, f"{mode};16B") * np.uint16(256) + _bytes(png, mode, f"{mode};16L")
    colours = levels[..., : 1 if png.header.channels < 3 else 3].astype(np.uint16)
    if png.header.channels in (2, 4):
        return colours, bool((levels[..., -1] == 65535).all())
    key = np.frombuffer(png.transparent, ">u2")
    return colours, len(key) != png.header.channels or not (colours == key).all(-1).any()


def _bytes(png: Png, mode: str, packed: str) -> np.ndarray:
    size = (png.header.width, png.header.height)
    image = Image.frombytes(mode, size, png.rows, "zip", packed, int(png.header.interlaced))
    return np.array(image)


def _inflated_length(compressed: bytes, enough: int) -> int:
    """Return how many bytes a stream holds, without keeping them; at most a little more than ``enough``."""
    inflater, found = zlib.decompressobj(), 0
    for start in range(0, len(compressed), _PIECE):
        found += len(inflater.decompress(compressed[start : start + _PIECE]))
        if inflater.eof or found > enough:
            return found
    raise ValueError("its stream of pixels is cut")
