"""Pictures and arrays from strangers: listed formats alone, and no memory before their size is known."""

import importlib
import io
import os
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image, ImageFile
from tiny_training import command_line, tiny_overrides

from ud2m.data.folder import image_size
from ud2m.images import decode_image, pixel_format, read_image
from ud2m.physics import DeepinvOperator, Jpeg, KernelFile, MaskCollection, MaskFile
from ud2m.raster import DEFAULT_LIMIT, LIMIT, max_pixels

sys.path.insert(0, str(REPOSITORY / "data_prep"))
make_shards = importlib.import_module("make_shards")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits=8, colour=2, rows=b"\0" * 64):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(kind, side=16):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 2, (side, side, 3), dtype=np.uint8) * 255
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def jpeg(width, height):
    data = bytearray(encoded("JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def bmp(width, height):
    data = bytearray(encoded("BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def webp(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, format="WEBP", lossless=True)
    data = bytearray(buffer.getvalue())
    (rest,) = struct.unpack("<I", data[21:25])  # behind RIFF, VP8L and their sizes: twice 14 bits, and four more
    data[21:25] = struct.pack("<I", (rest >> 28 << 28) | (height - 1) << 14 | (width - 1))
    return bytes(data)


BOMBS = {
    "grey.png": png(13000, 13000, colour=0),
    "colour.png": png(100_000, 100_000),
    "deep.png": png(20_000, 20_000, bits=16),
    "warned.png": png(11_000, 10_000),
    "last.png": png(2**31 - 1, 2**31 - 1),
    "a.jpg": jpeg(60_000, 60_000),
    "a.bmp": bmp(60_000, 60_000),
    "a.webp": webp(16_000, 16_000),
}
READERS = {
    "image": read_image,
    "bytes": lambda path: decode_image(path.read_bytes(), path),
    "format": pixel_format,
    "size": image_size,
    "mask": MaskFile,
    "kernel": KernelFile,
    "jpeg": lambda path: Jpeg().read_observation(path, 3, "cpu"),
}


def one_line(error, path):
    text = str(error.value)
    assert "\n" not in text
    assert text.count(str(path)) == 1, text
    assert len(text) < 500
    return text


@pytest.fixture
def undecoded(monkeypatch):
    """No pixel may be decoded, and no array read."""
    for place, name in ((ImageFile.ImageFile, "load"), (Image, "frombytes"), (np.lib.format, "read_array")):
        monkeypatch.setattr(place, name, lambda *arguments, **options: pytest.fail("decoded"))


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", BOMBS)
def test_too_many_pixels_are_refused_before_one_is_decoded(name, reader, tmp_path, undecoded, recwarn):
    path = tmp_path / name
    path.write_bytes(BOMBS[name])
    with pytest.raises(ValueError, match=f"has too many pixels: .*{LIMIT}") as error:
        READERS[reader](path)
    one_line(error, path)
    assert not list(recwarn)


@pytest.mark.parametrize("name", BOMBS)
def test_shards_list_what_is_too_large(name, tmp_path, undecoded):
    path = tmp_path / name
    path.write_bytes(BOMBS[name])
    made = make_shards.make_image(make_shards.Settings(), (0, make_shards.Entry(name, path, 0, path.stat().st_size)))
    assert made.broken.startswith("too many pixels: ")


def test_the_limit_is_a_setting(tmp_path, monkeypatch):
    assert max_pixels() == DEFAULT_LIMIT
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    monkeypatch.setenv(LIMIT, "255")
    with pytest.raises(ValueError, match="has too many pixels: 16x16, at most 255"):
        read_image(path)
    monkeypatch.setenv(LIMIT, "256")
    assert read_image(path).shape == (3, 16, 16)
    # above Pillow's own limit too
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_image(path).shape == (3, 16, 16)
    for wrong in ("0", "-1", "1e8", "many"):
        monkeypatch.setenv(LIMIT, wrong)
        with pytest.raises(ValueError, match=f"{LIMIT}, the largest number of pixels of a picture, is a whole number"):
            read_image(path)


FOREIGN = ["EPS", "GIF", "TIFF", "PPM", "ICO", "TGA", "SGI", "PCX", "PDF", "JPEG2000"]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_other_formats_are_not_opened(kind, reader, tmp_path, monkeypatch):
    path, gs = tmp_path / "a.png", tmp_path / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/mark\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}:{os.environ['PATH']}")
    try:
        path.write_bytes(encoded(kind))
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    with pytest.raises(ValueError, match="is not an image that can be read; expected PNG, JPEG, WEBP, BMP") as error:
        READERS[reader](path)
    one_line(error, path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("reader", ["image", "bytes", "mask", "kernel"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_cut_files_are_one_line(kind, reader, tmp_path):
    path, data = tmp_path / "a.png", encoded(kind, 64)
    for length in (0, 1, 10, 30, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"is (a )?truncated or damaged|is not an image") as error:
            READERS[reader](path)
        one_line(error, path)


def test_pipes_and_devices_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.npy")
    for read in (read_image, image_size, pixel_format, MaskFile, KernelFile):
        with pytest.raises(ValueError, match=r"a\.png is no ordinary file"):
            read(tmp_path / "a.png")
    for read in (read_image, KernelFile):
        with pytest.raises(ValueError, match=r"a\.npy is no ordinary file"):
            read(tmp_path / "a.npy")


def test_a_file_longer_than_any_picture_is_not_read(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    os.truncate(path, 10 * DEFAULT_LIMIT)  # sparse: it takes no space
    for read in (read_image, MaskFile, KernelFile):
        with pytest.raises(ValueError, match="is too large: 1000000000 bytes, at most 800000000") as error:
            read(path)
        one_line(error, path)


# --- arrays -------------------------------------------------------------------------------------------------------


def npy(shape, dtype="<f8", data=b"", version=b"\x01\x00", pad=0):
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}".ljust(117 + pad) + "\n"
    length = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return b"\x93NUMPY" + version + length + text.encode() + data


ARRAYS = {
    "claims 37 GiB": npy((70_000, 70_000)),
    "claims more than there is": npy((4, 4), data=bytes(127)),
    "a length beyond all": npy((2**62, 2**62)),
    "a negative length": npy((-1, 4), data=bytes(64)),
    "no width": npy((10**9, 10**9, 0)),
    "wide items": npy((1,), dtype="V2000000000"),
    "items of no width": npy((10**12,), dtype="|V0"),
    "objects": npy((1,), dtype="|O", data=bytes(8)),
    "text": npy((1,), dtype="<U1", data=bytes(4)),
    "a long header": npy((1,), data=bytes(8), version=b"\x02\x00", pad=60_000),
    "a header beyond the file": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    "another version": npy((1,), data=bytes(8), version=b"\x03\x00"),
    "a cut header": npy((4, 4))[:40],
    "code": b"\x93NUMPY\x01\x00\x76\x00" + b"__import__('os').system('touch mark')".ljust(117) + b"\n",
    "a pickle": b"\x80\x04\x95",
    "an archive": b"PK\x03\x04" + bytes(60),
    "nothing": b"",
}
ARRAY_READERS = {
    "image": read_image,
    "kernel": KernelFile,
    "deepinv": lambda path: DeepinvOperator("Inpainting", {"mask": str(path)}),
}


@pytest.mark.parametrize("reader", ARRAY_READERS)
@pytest.mark.parametrize("what", [key for key in ARRAYS if key != "no width"])
def test_what_an_array_claims_is_checked_first(what, reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(np.lib.format, "read_array", lambda *arguments, **options: pytest.fail("read"))
    path = tmp_path / "a.npy"
    path.write_bytes(ARRAYS[what])
    with pytest.raises(ValueError, match=r"is not a whole \.npy file of numbers|has too many") as error:
        ARRAY_READERS[reader](path)
    one_line(error, path)
    assert os.listdir() == ["a.npy"]


def test_a_long_array_is_too_large_even_if_it_is_there(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", np.zeros((20, 20)))
    monkeypatch.setenv(LIMIT, "99")
    for read in ARRAY_READERS.values():
        with pytest.raises(ValueError, match=r"has too many values: shape \(20, 20\), at most 396"):
            read(tmp_path / "a.npy")


def test_whole_arrays_are_read_as_ever(tmp_path):
    values = np.random.default_rng(0).random((5, 7))
    for order in "CF":
        np.save(tmp_path / "a.npy", np.asarray(values, order=order))
        assert np.array_equal(read_image(tmp_path / "a.npy", None)[0].numpy(), values.astype(np.float32))
        assert np.allclose(KernelFile(tmp_path / "a.npy").kernel[0, 0].numpy(), values / values.sum())


@pytest.mark.parametrize("what", ["claims 37 GiB", "wide items", "objects", "nothing", "code", "a pickle"])
def test_collections_of_masks_are_checked_alike(what, tmp_path, monkeypatch):
    monkeypatch.setattr(np.lib.format, "read_array", lambda *arguments, **options: pytest.fail("read"))
    path = tmp_path / "masks.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("20-30% freeform.npy", ARRAYS[what])
    with pytest.raises(ValueError, match=r"is not a whole \.npz file of numbers|has too many values") as error:
        MaskCollection(path)
    one_line(error, path)


def test_a_zip_bomb_of_masks_is_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "masks.npz"
    np.savez_compressed(path, **{"20-30% freeform": np.zeros(1000 * 1000, np.uint8)})
    monkeypatch.setenv(LIMIT, "65536")
    with pytest.raises(ValueError, match=r"has too many values: shape \(1000000,\), at most 262144") as error:
        MaskCollection(path)
    one_line(error, path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"is not a whole \.npz file of numbers"):
        MaskCollection(path)


# --- the commands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["colour.png", "claims 37 GiB"])
@pytest.mark.parametrize("command", ["mask", "kernel", "folder"])
def test_commands_say_it_in_one_line(command, name, tmp_path, capsys):
    for split in ("train", "val", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "b.png").write_bytes(encoded("PNG", 32))
    path = tmp_path / "train" / ("a.png" if name in BOMBS else "a.npy")
    path.write_bytes(BOMBS.get(name) or ARRAYS[name])
    words = [word for word in tiny_overrides("photos_prior", tmp_path) if command == "folder" or "data" not in word]
    words += [] if command == "folder" else [f"physics={command}", f"physics.{command}={path}"]
    assert command_line(*words, f"run_dir={tmp_path / 'run'}") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert str(path) in lines[0]


@pytest.mark.slow
def test_a_bomb_costs_no_memory(tmp_path):
    """Its header alone is read: a process with little address space left lives on."""
    (tmp_path / "a.png").write_bytes(png(13000, 13000, rows=bytes(13000 * 39001)))
    (tmp_path / "a.npy").write_bytes(ARRAYS["claims 37 GiB"])
    code = """
import resource, sys
from pathlib import Path
from ud2m.raster import read_header, read_numbers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for read in (lambda p: read_header(p / "a.png", "a"), lambda p: read_numbers(p / "a.npy", "a")):
    try:
        read(Path(sys.argv[1]))
    except ValueError as error:
        print(error)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 2
