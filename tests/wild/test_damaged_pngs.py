"""PNG files that are wrong inside: one line that names the file, no black rows, and the process lives."""

import importlib
import sys
import zlib

import numpy as np
import pytest
import torch
import torchvision
from conftest import REPOSITORY
from PIL import Image
from png_files import COLOURS, chunk, container, header, interlaced, interlaced_rows, png, random_levels, rows_of

from ud2m.data.folder import image_size
from ud2m.images import read_image
from ud2m.physics import KernelFile, MaskFile
from ud2m.raster import read_picture

sys.path.insert(0, str(REPOSITORY / "data_prep"))
make_shards = importlib.import_module("make_shards")
READERS = {"image": read_image, "mask": MaskFile, "kernel": KernelFile}
KINDS = [(dtype, channels) for dtype in (np.uint8, np.uint16) for channels in COLOURS]


def opaque(levels):
    if levels.shape[2] in (2, 4):
        levels[..., -1] = np.iinfo(levels.dtype).max
    return levels


def with_stream(levels, compressed):
    height, width, channels = levels.shape
    head = header(width, height, 8 * levels.dtype.itemsize, COLOURS[channels])
    return container(head, b"").replace(chunk(b"IDAT", zlib.compress(b"")), chunk(b"IDAT", compressed))


def swapped(data, old, new):
    assert data.count(old) == 1
    return data.replace(old, new)


HEAD = header(9, 8)
WRONG = {
    "filter 9": lambda levels: with_stream(levels, zlib.compress(b"\11" + rows_of(levels)[1:])),
    "a filter 9 in the last row": lambda levels: with_stream(
        levels, zlib.compress(b"".join(_last(rows_of(levels), len(levels))))
    ),
    "a row is missing": lambda levels: with_stream(levels, zlib.compress(rows_of(levels[:-1]))),
    "a byte is missing": lambda levels: with_stream(levels, zlib.compress(rows_of(levels)[:-1])),
    "a row too many": lambda levels: with_stream(levels, zlib.compress(rows_of(np.concatenate([levels, levels[:1]])))),
    "no row": lambda levels: with_stream(levels, zlib.compress(b"")),
    "no bytes": lambda levels: with_stream(levels, b""),
    "a cut stream": lambda levels: with_stream(levels, zlib.compress(rows_of(levels))[:-10]),
    "a stream without its checksum": lambda levels: with_stream(levels, zlib.compress(rows_of(levels))[:-4]),
    "another checksum": lambda levels: with_stream(levels, zlib.compress(rows_of(levels))[:-4] + b"abcd"),
    "no pixels": lambda levels: swapped(png(levels), _idat(levels), b""),
    "pixels in two places": lambda levels: swapped(
        png(levels), _idat(levels), _idat(levels) + chunk(b"tEXt", b"a\0b") + chunk(b"IDAT", b"a")
    ),
    "a flipped bit": lambda levels: swapped(png(levels), _idat(levels), _flipped(_idat(levels))),
    "a flipped bit in a text": lambda levels: png(levels, early=_flipped(chunk(b"tEXt", b"abcdefgh\0abcdefghij"))),
    "no end": lambda levels: png(levels)[:-12],
    "half an end": lambda levels: png(levels)[:-6],
    "two headers": lambda levels: png(levels, early=HEAD),
}


def _last(rows, count):
    length = len(rows) // count
    yield rows[:-length]
    yield b"\11"
    yield rows[-length + 1 :]


def _idat(levels):
    return chunk(b"IDAT", zlib.compress(rows_of(levels)))


def _flipped(data):
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]


@pytest.mark.parametrize(("dtype", "channels"), KINDS)
@pytest.mark.parametrize("what", WRONG)
def test_wrong_files_are_one_line_that_names_them(what, dtype, channels, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(WRONG[what](opaque(random_levels(dtype, 8, 9, channels))))
    for read in READERS.values():
        with pytest.raises(ValueError, match=r"a\.png is (a? ?truncated or damaged|not an image)") as error:
            read(path)
        text = str(error.value)
        assert "\n" not in text
        assert text.count(str(path)) == 1
    entry = make_shards.Entry("a.png", path, 0, path.stat().st_size)
    assert make_shards.make_image(make_shards.Settings(), (0, entry)).broken


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_rows_may_be_missing_in_the_passes_of_an_interlaced_picture(dtype, tmp_path):
    levels = random_levels(dtype, 11, 13, 3)
    head = header(13, 11, 8 * levels.dtype.itemsize, 2, interlaced=True)
    for kept in (-1, -60, 40):
        (tmp_path / "a.png").write_bytes(container(head, interlaced_rows(levels)[:kept]))
        with pytest.raises(ValueError, match=r"a\.png is a truncated or damaged PNG file: its header says \d+ bytes"):
            read_image(tmp_path / "a.png")


def test_one_pixel_of_filter_9(tmp_path):
    """The smallest file that ended the process."""
    (tmp_path / "a.png").write_bytes(container(header(1, 1, 16), b"\11" + bytes(6)))
    with pytest.raises(ValueError, match=r"a\.png is a truncated or damaged PNG file"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("depth", [(0, 3), (2, 4), (3, 16), (4, 1), (6, 2), (5, 8), (1, 8), (7, 16)])
def test_headers_of_no_png(depth, tmp_path):
    colour, bits = depth
    (tmp_path / "a.png").write_bytes(container(header(4, 4, bits, colour), bytes(200)))
    for read in (*READERS.values(), image_size):
        with pytest.raises(ValueError, match=r"a\.png is (a? ?truncated or damaged|not an image)"):
            read(tmp_path / "a.png")


# --- what is right is read, to the last bit ---------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "channels"), KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (8, 1), (11, 13)], ids=str)
def test_filters_and_passes_are_undone(shape, dtype, channels, tmp_path):
    levels = opaque(random_levels(dtype, *shape, channels))
    colours = levels[..., : 1 if channels < 3 else 3]
    for data in (png(levels, filters=(0, 1, 2, 3, 4)), png(levels, filters=(4, 3)), interlaced(levels)):
        assert np.array_equal(read_picture(data, "a"), colours)
        # a second decoder, on what is known to be right
        decoded = torchvision.io.decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        expected = decoded[: 1 if channels < 3 else 3].permute(1, 2, 0)
        assert np.array_equal(read_picture(data, "a"), expected.numpy())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("width", [1, 7, 8, 9])
def test_small_depths_and_palettes_have_rows_of_whole_bytes(bits, width):
    for colour in (0, 3):
        rows = b"".join(b"\0" + bytes(-(-width * bits // 8)) for _ in range(5))
        palette = chunk(b"PLTE", bytes([200, 100, 50] * 2**bits)) if colour == 3 else b""
        levels = read_picture(container(header(width, 5, bits, colour), rows, palette), "a")
        expected = np.zeros((5, width, 1)) if colour == 0 else np.broadcast_to([200, 100, 50], (5, width, 3))
        assert np.array_equal(levels, expected)
        with pytest.raises(ValueError, match="its header says"):
            read_picture(container(header(width, 5, bits, colour), rows[:-1], palette), "a")


def test_pixels_in_many_chunks_and_bytes_behind_the_end_do_no_harm():
    levels = random_levels(np.uint16, 40, 30, 3)
    compressed = zlib.compress(rows_of(levels))
    pieces = b"".join(chunk(b"IDAT", compressed[i : i + 100]) for i in range(0, len(compressed), 100)) + chunk(
        b"IDAT", b""
    )
    data = swapped(png(levels), chunk(b"IDAT", compressed), pieces) + b"more"
    assert np.array_equal(read_picture(data, "a"), levels)


def test_a_bomb_behind_the_header_is_not_unpacked(tmp_path):
    """A stream of many more rows than the header says is not followed to its end."""
    data = container(header(4, 4), bytes(200_000_000))
    with pytest.raises(ValueError, match="its header says 52 bytes of rows, and more are there"):
        read_picture(data, "a")


@pytest.mark.parametrize("channels", [1, 3])
def test_shards_round_16_bits_to_8(channels, tmp_path):
    levels = random_levels(np.uint16, 16, 16, channels)
    (tmp_path / "a.png").write_bytes(png(levels))
    image = make_shards.decode((tmp_path / "a.png").read_bytes())
    expected = np.round(levels / 65535 * 255).astype(np.uint8)
    assert np.array_equal(np.asarray(image), np.broadcast_to(expected, (16, 16, 3)))
    assert isinstance(image, Image.Image)
