"""Everything that a picture file says is honoured or refused, by every reader alike."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from png_files import chunk, png, random_levels

from ud2m.data.folder import image_size
from ud2m.images import PixelFormat, pixel_format, read_image, to_png_bytes
from ud2m.physics import DeepinvOperator, Jpeg, KernelFile, MaskFile
from ud2m.raster import read_picture

READERS = {"image": read_image, "mask": MaskFile, "kernel": KernelFile}
ORIENTATION = 0x0112
XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


def exif(orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags.tobytes()


def saved(levels, **options):
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, **options)
    return buffer.getvalue()


def in_xmp(orientation):
    return chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.format(orientation).encode())


TURNED = {
    "exif.png": lambda levels, n: saved(levels, format="PNG", exif=exif(n)),
    "exif.webp": lambda levels, n: saved(levels, format="WEBP", lossless=True, exif=exif(n)),
    "exif.jpg": lambda levels, n: saved(levels, format="JPEG", quality=100, subsampling=0, exif=exif(n)),
    "xmp.jpg": lambda levels, n: saved(levels, format="JPEG", quality=100, subsampling=0, xmp=XMP.format(n).encode()),
    "late.png": lambda levels, n: png(levels, late=chunk(b"eXIf", exif(n)[6:])),
    "xmp.png": lambda levels, n: png(levels, in_xmp(n)),
    "late xmp.png": lambda levels, n: png(levels, late=in_xmp(n)),
    "deep.png": lambda levels, n: png(levels * np.uint16(257), chunk(b"eXIf", exif(n)[6:])),
    "deep xmp.png": lambda levels, n: png(levels * np.uint16(257), late=in_xmp(n)),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", TURNED)
def test_pictures_masks_and_kernels_are_turned_upright(name, orientation, tmp_path):
    # oracle: Pillow turns a file that says it in the plain way
    stored = np.kron(random_levels(np.uint8, 3, 5) // 128 * 255, np.ones((8, 8), np.uint8))
    stored = np.repeat(stored[..., None], 3, axis=2)
    plain = ImageOps.exif_transpose(Image.open(io.BytesIO(TURNED["exif.png"](stored, orientation))))
    expected = torch.from_numpy(np.array(plain)[..., 0] > 127)
    path = tmp_path / name
    path.write_bytes(TURNED[name](stored, orientation))
    assert torch.equal(read_image(path, 1)[0] > 0.5, expected)
    assert torch.equal(MaskFile(path).mask[0, 0], expected)
    kernel = KernelFile(path).kernel[0, 0]
    assert torch.equal(kernel > 0.5 * kernel.max(), expected)
    assert image_size(path) == expected.shape


def test_a_jpeg_that_is_to_be_turned_has_no_coefficients_upright(tmp_path):
    pytest.importorskip("jpeglib")
    (tmp_path / "a.jpg").write_bytes(TURNED["exif.jpg"](random_levels(np.uint8, 16, 24, 3), 6))
    with pytest.raises(ValueError, match=r"a\.jpg is to be turned \(EXIF orientation 6\).*jpegtran"):
        Jpeg().read_observation(tmp_path / "a.jpg", 3, "cpu")


def test_without_jpeglib_a_jpeg_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jpeglib", None)
    (tmp_path / "a.jpg").write_bytes(saved(random_levels(np.uint8, 16, 24, 3), format="JPEG"))
    with pytest.raises(ValueError, match=r"of .*a\.jpg are read with jpeglib: pip install 'ud2m\[jpeg\]'$"):
        Jpeg().read_observation(tmp_path / "a.jpg", 3, "cpu")


def test_a_cut_jpeg_has_no_coefficients(tmp_path):
    pytest.importorskip("jpeglib")
    data = saved(random_levels(np.uint8, 64, 64, 3), format="JPEG", quality=90)
    for length in (len(data) // 2, len(data) - 40, len(data) - 20):
        (tmp_path / "a.jpg").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"a\.jpg is a truncated or damaged JPEG file"):
            Jpeg().read_observation(tmp_path / "a.jpg", 3, "cpu")


# --- further pictures, alpha ----------------------------------------------------------------------------------------


def several(kind, size=(12, 8)):
    first, second = Image.new("RGB", (12, 8), "white"), Image.new("RGB", size, "red")
    buffer = io.BytesIO()
    first.save(buffer, format=kind, save_all=True, append_images=[second])
    return buffer.getvalue()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "MPO"])
def test_files_of_several_pictures_are_refused(kind, reader, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(several(kind))
    with pytest.raises(ValueError, match=r"a\.png has 2 pictures in it; save the one that is meant"):
        READERS[reader](path)


def test_previews_of_a_camera_are_no_further_pictures(tmp_path):
    (tmp_path / "a.jpg").write_bytes(several("MPO", (6, 4)))
    assert read_image(tmp_path / "a.jpg").shape == (3, 8, 12)
    assert read_image(tmp_path / "a.jpg").min() > 0.99


TRANSPARENT = {
    "alpha": lambda: png(np.dstack([np.full((8, 9, 3), 255, np.uint8), random_levels(np.uint8, 8, 9)])),
    "grey alpha": lambda: png(np.dstack([np.full((8, 9), 255, np.uint8), random_levels(np.uint8, 8, 9)])),
    "deep alpha": lambda: png(np.dstack([np.full((8, 9, 3), 65535, np.uint16), random_levels(np.uint16, 8, 9)])),
    "deep grey alpha": lambda: png(np.dstack([np.full((8, 9), 65535, np.uint16), random_levels(np.uint16, 8, 9)])),
    "key": lambda: png(random_levels(np.uint8, 8, 9, 1) // 128, chunk(b"tRNS", b"\0\1")),
    "deep key": lambda: png(np.full((8, 9, 3), 515, np.uint16), chunk(b"tRNS", b"\2\3" * 3)),
    "deep grey key": lambda: png(np.full((8, 9, 1), 515, np.uint16), chunk(b"tRNS", b"\2\3")),
    "webp": lambda: saved(random_levels(np.uint8, 8, 9, 4), format="WEBP", lossless=True),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", TRANSPARENT)
def test_what_lies_in_alpha_is_not_lost(kind, reader, tmp_path):
    (tmp_path / "a.png").write_bytes(TRANSPARENT[kind]())
    with pytest.raises(ValueError, match=r"a\.png has transparent pixels"):
        READERS[reader](tmp_path / "a.png")


def test_a_key_that_no_pixel_has_is_opaque(tmp_path):
    for levels in (random_levels(np.uint16, 8, 9, 3), random_levels(np.uint16, 8, 9, 1)):
        kept = levels.copy()
        kept[kept == 515] = 516
        data = png(kept, chunk(b"tRNS", b"\2\3" * levels.shape[2]))
        assert np.array_equal(read_picture(data, "a"), kept)


# --- masks and kernels ------------------------------------------------------------------------------------------------


MASKS = {
    "0 and 1": (random_levels(np.uint8, 8, 9) % 2, "levels 0, 1 of 255.*Scale a mask of 0 and 1 by 255"),
    "labels": (random_levels(np.uint8, 8, 9) % 4, "levels 0, 1, 2, 3 of 255"),
    "colours": (np.array([[[0, 0, 0], [255, 0, 0]]], np.uint8), "50 % of its pixels are grey or coloured"),
    "grey": (np.array([[0, 100, 255, 255]], np.uint8), "25 % of its pixels are grey or coloured: it has levels 0, 100"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_that_are_not_black_and_white_say_what_they_hold(kind, tmp_path):
    levels, message = MASKS[kind]
    Image.fromarray(levels).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=rf"the mask .*a\.png.*{message}"):
        MaskFile(tmp_path / "a.png")


def test_palettes_of_labels_are_named_as_such(tmp_path):
    image = Image.fromarray(random_levels(np.uint8, 8, 9) % 3).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    image.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="grey or coloured: it has levels 0, 128 of 255; white is measured"):
        MaskFile(tmp_path / "a.png")


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", ">f4", "float64"])
@pytest.mark.parametrize("name", ["a.npy", "A.NPY"])
def test_masks_may_be_arrays_of_0_and_1(name, dtype, tmp_path):
    known = random_levels(np.uint8, 8, 9) < 100
    with (tmp_path / name).open("wb") as file:
        np.save(file, known.astype(dtype))
    assert torch.equal(MaskFile(tmp_path / name).mask[0, 0], torch.from_numpy(known))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[0, 255]]), "50 % .* values 0, 255; 1 is measured"),
        (np.array([[0.0, np.nan]]), "values 0, nan"),
        (np.zeros((2, 2)), "every pixel is missing"),
        (np.ones((3, 8, 9)), r"a matrix \[H, W\], got shape \[3, 8, 9\]"),
        (np.ones((0, 3)), "a matrix"),
    ],
)
def test_arrays_that_are_no_masks(array, message, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        MaskFile(tmp_path / "a.npy")


def test_arrays_in_capitals_and_in_the_other_order_of_bytes_are_read(tmp_path):
    values = np.random.default_rng(0).random((5, 7))
    for dtype in (">f8", "<f8", ">f4"):
        with (tmp_path / "A.NPY").open("wb") as file:
            np.save(file, values.astype(dtype))
        path = tmp_path / "A.NPY"
        assert np.allclose(read_image(path, 1)[0], values, atol=1e-6)
        assert np.allclose(KernelFile(path).kernel[0, 0], values / values.sum(), atol=1e-6)
        assert np.allclose(DeepinvOperator("Inpainting", {"mask": str(path)}).parameters["mask"], values, atol=1e-6)
        assert pixel_format(path) == PixelFormat(16)
        assert image_size(path) == (5, 7)


def test_imaginary_parts_are_kept_or_refused(tmp_path):
    values = np.random.default_rng(0).random((5, 7)) + 1j
    np.save(tmp_path / "a.npy", values)
    for read in (KernelFile, read_image):
        with pytest.raises(ValueError, match=r"a\.npy.* complex128"):
            read(tmp_path / "a.npy")
    kept = DeepinvOperator("MultiCoilMRI", {"coil_maps": str(tmp_path / "a.npy")}).parameters["coil_maps"]
    assert kept.dtype == torch.complex64
    assert np.allclose(kept, values)


def test_kernels_in_colour_are_refused(tmp_path):
    Image.fromarray(random_levels(np.uint8, 5, 5, 3)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="is in colour, but the weights of a kernel are grey levels"):
        KernelFile(tmp_path / "a.png")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_bit_of_a_kernel_counts(dtype, tmp_path):
    levels = random_levels(dtype, 5, 7, 1)
    for kernel in (levels, levels.repeat(3, axis=2)):
        (tmp_path / "a.png").write_bytes(png(kernel))
        expected = levels[..., 0] / levels.sum(dtype=float)
        assert np.allclose(KernelFile(tmp_path / "a.png").kernel[0, 0], expected, rtol=1e-12)


# --- colour profiles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("space", [b"RGB ", b"GRAY", b"CMYK", b"Lab ", b""])
def test_a_profile_is_written_with_pixels_of_its_space_alone(space, bits):
    profile = (bytes(16) + space).ljust(128, b"\0") if space else b"short"
    for channels, fitting in ((1, b"GRAY"), (3, b"RGB ")):
        data = to_png_bytes(torch.zeros(channels, 4, 5), PixelFormat(bits, profile))
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert image.info.get("icc_profile") == (profile if space == fitting else None)
