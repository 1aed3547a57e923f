"""PNG files made from the specification alone, right and wrong ones."""

import struct
import zlib

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}
"""Colour type by the number of channels."""


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width, height, bits=8, colour=2, interlaced=False):
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced)))


def container(head, rows, early=b"", late=b""):
    """Frame rows as they are before compression."""
    return SIGNATURE + head + early + chunk(b"IDAT", zlib.compress(rows)) + late + chunk(b"IEND", b"")


def rows_of(levels, filters=(0,)):
    """Return filtered rows of [H, W, C] of 8 or 16 bits (section 9 of the specification); filters take turns."""
    raw = levels.astype(levels.dtype.newbyteorder(">")).reshape(len(levels), -1).view(np.uint8).astype(int)
    width = levels.shape[2] * levels.dtype.itemsize
    out, above = b"", np.zeros(raw.shape[1], int)
    for number, row in enumerate(raw):
        left = np.concatenate([np.zeros(width, int), row[:-width]])
        corner = np.concatenate([np.zeros(width, int), above[:-width]])
        guess = left + above - corner
        distances = np.abs(guess - np.stack([left, above, corner]))
        paeth = np.choose(distances.argmin(0), [left, above, corner])
        predictions = (0 * row, left, above, (left + above) // 2, paeth)
        kind = filters[number % len(filters)]
        out += bytes([kind]) + ((row - predictions[kind]) % 256).astype(np.uint8).tobytes()
        above = row
    return out


def png(levels, early=b"", late=b"", filters=(0,)):
    """Encode [H, W, C], uint8 or uint16."""
    height, width, channels = levels.shape
    head = header(width, height, 8 * levels.dtype.itemsize, COLOURS[channels])
    return container(head, rows_of(levels, filters), early, late)


PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row of each pass of Adam7, and its steps (section 8 of the specification)."""


def interlaced_rows(levels):
    parts = [levels[y::down, x::right] for x, y, right, down in PASSES]
    return b"".join(rows_of(part) for part in parts if part.size)


def interlaced(levels):
    height, width, channels = levels.shape
    head = header(width, height, 8 * levels.dtype.itemsize, COLOURS[channels], interlaced=True)
    return container(head, interlaced_rows(levels))


def random_levels(dtype, *shape):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)
