"""Image files: exact round trips, orientation, and a clear error for each kind of bad file."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageCms, ImageOps

from ud2m.images import (
    PixelFormat,
    list_images,
    pixel_format,
    read_image,
    std_image,
    std_scale,
    to_png_bytes,
    write_image,
)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(levels: np.ndarray, extra: bytes = b"") -> bytes:
    """Encode [H, W, C] of 16 bits, straight from the PNG specification (Pillow cannot write colour of 16 bits)."""
    height, width, channels = levels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    body = extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def random_levels(top: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, top + 1, shape)


def save(path: Path, levels: np.ndarray, **options) -> Path:
    Image.fromarray(levels.astype(np.uint8)).save(path, **options)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_8_bit_round_trip_is_exact(tmp_path, channels):
    image = torch.from_numpy(random_levels(255, channels, 5, 7)).float() / 255
    write_image(image, tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png", channels=None), image)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_writing_clamps_and_rounds_to_the_nearest_level(tmp_path):
    write_image(torch.tensor([[[-0.3, 0.4 / 255, 0.6 / 255, 1.7]]]), tmp_path / "a.png")
    assert np.array_equal(np.array(Image.open(tmp_path / "a.png")), [[0, 0, 1, 255]])


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_keeps_every_bit(tmp_path, channels):
    levels = random_levels(65535, 6, 4, channels)
    if channels in (2, 4):
        levels[..., -1] = 65535  # opaque alpha
    (tmp_path / "a.png").write_bytes(png16(levels))
    colours = levels[..., : 1 if channels < 3 else 3]
    image = read_image(tmp_path / "a.png", channels=None)
    assert torch.equal((image.double() * 65535).round(), torch.from_numpy(colours).permute(2, 0, 1).double())


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_and_the_colour_profile_are_written_and_found_again(tmp_path, channels):
    # Oracles: torchvision's decoder for the levels, Pillow's for the profile.
    levels = torch.randint(0, 65536, (channels, 5, 7), generator=torch.Generator().manual_seed(0))
    colour = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = colour if channels == 3 else colour[:16] + b"GRAY" + colour[20:]
    for bits, top in ((16, 65535), (8, 255)):
        pixels = PixelFormat(bits, profile)
        path = tmp_path / f"{bits}.png"
        write_image(levels / 65535, path, pixels)
        assert pixel_format(path) == pixels
        with Image.open(path) as image:
            image.load()
            assert image.info["icc_profile"] == profile
        expected = (levels * (top / 65535)).round()
        decoded = torchvision.io.decode_png(torchvision.io.read_file(str(path)))
        assert (decoded.double() - expected).abs().max() <= (0 if bits == 16 else 1)
        assert torch.allclose(read_image(path, channels), levels / 65535, atol=0.51 / top)


def test_8_bit_values_are_k_over_255(tmp_path):
    levels = random_levels(255, 4, 5, 3)
    image = read_image(save(tmp_path / "a.bmp", levels))
    assert image.dtype == torch.float32
    assert torch.equal(image, torch.from_numpy(levels).permute(2, 0, 1).float() / 255)


def test_jpeg_is_near_the_original(tmp_path):
    levels = np.full((16, 16, 3), (200, 100, 50))
    image = read_image(save(tmp_path / "a.jpg", levels, quality=95))
    assert (image * 255 - torch.tensor([200.0, 100.0, 50.0])[:, None, None]).abs().max() <= 3


def test_palette_and_one_bit_files(tmp_path):
    colours = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 0, 0)]], dtype=np.uint8)
    Image.fromarray(colours).quantize(3).save(tmp_path / "palette.png")
    assert torch.equal(read_image(tmp_path / "palette.png", None), torch.from_numpy(colours).permute(2, 0, 1) / 255)
    Image.fromarray(np.array([[True, False, True]])).save(tmp_path / "mask.png")
    assert torch.equal(read_image(tmp_path / "mask.png", channels=None), torch.tensor([[[1.0, 0.0, 1.0]]]))


def test_channels_are_repeated_or_weighted_to_luma(tmp_path):
    grey = read_image(save(tmp_path / "grey.png", random_levels(255, 4, 5)), channels=3)
    assert grey.shape == (3, 4, 5)
    assert torch.equal(grey[0], grey[2])
    levels = random_levels(255, 4, 5, 3)
    path = save(tmp_path / "colour.png", levels)
    pillow = np.array(Image.open(path).convert("L"), dtype=float)  # rounds to integers
    assert np.abs(read_image(path, channels=1)[0].numpy() * 255 - pillow).max() < 1
    with pytest.raises(ValueError, match=r"a picture of 3 channels is none of 2; give a .npy file"):
        read_image(path, channels=2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_respected_at_8_and_16_bits(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    levels = random_levels(255, 3, 4, 3)
    path = save(tmp_path / "a.png", levels, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path))
    expected = torch.from_numpy(np.array(upright)).permute(2, 0, 1) / 255
    assert torch.equal(read_image(path), expected)
    tag = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    (tmp_path / "deep.png").write_bytes(png16(levels * 257, tag))
    assert torch.allclose(read_image(tmp_path / "deep.png"), expected, atol=1e-6)


def test_jpeg_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the file's top is the right side
    levels = np.zeros((8, 16), dtype=int)
    levels[:, :8] = 255
    image = read_image(save(tmp_path / "a.jpg", levels, exif=exif), channels=1)
    assert image.shape == (1, 16, 8)
    assert image[0, 0].mean() > 0.9  # left of the file is up
    assert image[0, -1].mean() < 0.1


def test_opaque_alpha_is_dropped_and_transparency_refused(tmp_path):
    levels = random_levels(255, 4, 5, 4)
    levels[..., 3] = 255
    opaque = read_image(save(tmp_path / "opaque.png", levels))
    assert torch.equal(opaque, torch.from_numpy(levels[..., :3]).permute(2, 0, 1) / 255)
    levels[1, 2, 3] = 254
    with pytest.raises(ValueError, match="transparent pixels; flatten"):
        read_image(save(tmp_path / "clear.png", levels))
    with pytest.raises(ValueError, match="transparent pixels"):
        read_image(save(tmp_path / "keyed.png", levels[..., 0], transparency=int(levels[0, 0, 0])))
    deep = np.full((4, 5, 4), 30000)
    (tmp_path / "deep.png").write_bytes(png16(deep))
    with pytest.raises(ValueError, match="transparent pixels"):
        read_image(tmp_path / "deep.png")


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3), (3, 4, 5), (1, 4, 5)])
def test_npy_layouts(tmp_path, shape):
    array = np.random.default_rng(0).normal(0.5, 0.2, shape).clip(-0.4, 1.4)
    np.save(tmp_path / "a.npy", array)
    image = read_image(tmp_path / "a.npy", channels=None)
    assert image.dtype == torch.float32
    assert image.shape[1:] == (4, 5)
    channel_last = array if array.shape[-1] in (1, 3) else array.reshape(-1, 4, 5).transpose(1, 2, 0)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), channel_last.astype(np.float32))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[0.5, np.nan]]), "NaN"),
        (np.array([[0.5, np.inf]]), "NaN or infinite"),
        (np.array([[-1.0, 1.0]]), r"from -1 to 1; expected about \[0, 1\]"),
        (np.array([[0.0, 255.0]]), "divide 8-bit values by 255"),
        (np.array([[0, 255]], dtype=np.uint8), "uint8 values; expected floats"),
        (np.zeros((2, 2), dtype=complex), "complex128 values"),
        (np.zeros((2, 4, 5)), r"shape \(2, 4, 5\); expected"),
        (np.zeros((0, 4)), "shape"),
        (np.array([{}]), "not a whole .npy file"),
    ],
)
def test_bad_arrays(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_image(tmp_path / "a.npy")


def test_missing_path_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*absent\.png"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        list_images(tmp_path / "absent")
    with pytest.raises(IsADirectoryError, match="is a folder, not an image file"):
        read_image(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"GIF89a" + bytes(50), b"%PDF-1.4 " + bytes(50)])
def test_files_that_are_no_images(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png is not an image that can be read; expected PNG, JPEG"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "deep.png", "a.npy"])
def test_truncated_files(tmp_path, name):
    path = tmp_path / name
    if name == "deep.png":
        path.write_bytes(png16(random_levels(65535, 32, 32, 3)))
    elif name == "a.npy":
        np.save(path, np.zeros((32, 32)))
    else:
        save(path, random_levels(255, 32, 32, 3))
    data = path.read_bytes()
    for part in (0.1, 0.5, 0.9):
        path.write_bytes(data[: int(part * len(data))])
        with pytest.raises(ValueError, match=name) as caught:
            read_image(path)
        assert any(word in str(caught.value) for word in ("truncated", "not a whole", "not an image"))


def test_damage_inside_a_deep_png_is_an_error_not_a_crash(tmp_path):
    data = png16(random_levels(65535, 20, 10, 3))
    for position in range(33, len(data) - 12, 29):
        damaged = bytearray(data)
        damaged[position] ^= 0x55
        (tmp_path / "a.png").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.png"):
            read_image(tmp_path / "a.png")


def test_list_images_sorts_and_passes_over_what_is_no_image(tmp_path):
    for name in ("b.PNG", "a.jpeg", "c.npy", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in list_images(tmp_path)] == ["a.jpeg", "b.PNG", "c.npy"]
    assert list_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]  # asked for by name: the reader judges


def test_list_images_of_an_empty_folder(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"no image in the folder .* expected files that end in \.png"):
        list_images(tmp_path)


def test_write_refuses_what_is_no_image(tmp_path):
    with pytest.raises(ValueError, match=r"let it end in \.png"):
        write_image(torch.zeros(3, 2, 2), tmp_path / "a.jpg")
    for shape in ((2, 2), (2, 4, 4), (1, 3, 4, 4), (3, 0, 4)):
        with pytest.raises(ValueError, match=r"shape \[1 or 3, H, W\]"):
            write_image(torch.zeros(shape), tmp_path / "a.png")
    with pytest.raises(ValueError, match="NaN"):
        write_image(torch.full((1, 2, 2), float("nan")), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_png_bytes_take_any_float_with_gradient():
    image = torch.full((3, 2, 2), 0.5, dtype=torch.bfloat16, requires_grad=True)
    assert np.array(Image.open(io.BytesIO(to_png_bytes(image)))).tolist() == np.full((2, 2, 3), 128).tolist()


@pytest.mark.parametrize(
    ("value", "scale"), [(0.0834, 0.084), (0.084, 0.084), (0.12, 0.12), (0.1201, 0.13), (0.0, 0.004), (1.02, 1.1)]
)
def test_std_scale_is_rounded_up_to_two_digits(value, scale):
    assert std_scale(torch.full((3, 8, 8), value)) == pytest.approx(scale, rel=1e-9)


def test_std_scale_passes_over_single_outliers():
    std = torch.full((1, 32, 32), 0.02)
    std[0, 3, 4] = 5.0
    assert std_scale(std) == pytest.approx(0.02)


def test_std_image_colours_the_mean_over_channels():
    std = torch.tensor([0.0, 0.1, 0.2]).view(3, 1, 1).expand(3, 1, 4).clone()  # mean 0.1
    std[:, :, 3] = 9.0
    image, scale = std_image(std, scale=0.2)
    assert (image.shape, scale) == ((3, 1, 4), 0.2)
    inferno_middle = torch.tensor([0.735683, 0.215906, 0.330245])  # entry 128 of matplotlib's published table
    assert torch.allclose(image[:, 0, 0], inferno_middle, atol=1e-4)
    assert torch.allclose(image[:, 0, 3], torch.tensor([0.988362, 0.998364, 0.644924]), atol=1e-4)  # the end


def test_std_image_refuses_bad_values():
    with pytest.raises(ValueError, match="must be positive"):
        std_image(torch.ones(1, 2, 2), scale=0.0)
    for function in (std_scale, std_image):
        with pytest.raises(ValueError, match="a single sample has none"):
            function(torch.full((1, 2, 2), float("nan")))
