"""JPEG: coefficients against the real codec, the projection against quadratic programming and finite differences."""

import io

import numpy as np
import pytest
import scipy.optimize
import torch
from dense_prox import joint_prox
from PIL import Image

from ud2m.data.photos import PHOTOS, load_photo
from ud2m.physics import Jpeg, JpegCodec, estimate_sigma_y, image_shape, misfit, observe, residual, select_samples
from ud2m.physics.jpeg import levels
from ud2m.physics.jpeg_codec import FACTORS, Layout, encode, quality_tables

jpeglib = pytest.importorskip("jpeglib", reason="needs jpeglib: pip install jpeglib")
PILLOW_SUBSAMPLING = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}


def written(pixels, folder, quality, subsampling="4:4:4"):
    """Write uint8 [H, W, C] as JPEG by Pillow; return the path and its coefficients by component, read by jpeglib."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    options = {} if pixels.shape[-1] == 1 else {"subsampling": PILLOW_SUBSAMPLING[subsampling]}
    path = folder / "picture.jpg"
    image.save(path, quality=quality, **options)
    file = jpeglib.read_dct(str(path))
    return path, [c.astype(np.float64) for c in (file.Y, file.Cb, file.Cr) if c is not None]


def as_tensor(pixels):
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).unsqueeze(0) / 255


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def assert_same_coefficients(pixels, quality, subsampling, folder):
    height, width, channels = pixels.shape
    _, expected = written(pixels, folder, quality, subsampling)
    layout = Layout(height, width, channels, FACTORS[subsampling] if channels == 3 else (1, 1))
    coefficients = encode(as_tensor(pixels), layout, quality_tables(quality, channels).unsqueeze(0))
    for own, real in zip(coefficients, expected, strict=True):
        np.testing.assert_array_equal(own[0].numpy(), real)


@pytest.mark.parametrize("quality", [5, 10, 50, 95])
def test_coefficients_of_photographs_are_those_of_the_real_encoder(quality, tmp_path):
    # twenty crops: every photograph at two places, the chroma averaged in turn in the three ways
    crops = []
    for item in PHOTOS:
        photo = load_photo(item).numpy().transpose(1, 2, 0)
        crops += [photo[:120, :168], photo[-88:, -104:]]
    assert len(crops) >= 20
    for number, crop in enumerate(crops):
        assert_same_coefficients(crop, quality, list(FACTORS)[number % 3], tmp_path)


@pytest.mark.parametrize("subsampling", FACTORS)
@pytest.mark.parametrize("size", [(16, 16), (45, 51), (47, 33), (8, 25), (1, 1)])
def test_coefficients_of_any_size_are_those_of_the_real_encoder(size, subsampling, tmp_path):
    # noise has the largest coefficients, and makes every wrong rounding or padding visible
    for quality in (1, 30, 75, 100):
        assert_same_coefficients(noise(*size), quality, subsampling, tmp_path)
        assert_same_coefficients(noise(*size, channels=1), quality, subsampling, tmp_path)


@pytest.mark.parametrize("subsampling", FACTORS)
@pytest.mark.parametrize("size", [(32, 32), (45, 51)])
def test_a_file_read_back_is_the_observation_of_its_pixels(size, subsampling, tmp_path):
    pixels = noise(*size)
    path, _ = written(pixels, tmp_path, 20, subsampling)
    y, codec = Jpeg().read_observation(path, 3, "cpu")  # another quality: the file's own tables count
    expected = Jpeg(20, subsampling).draw(1, (3, *size)).A(as_tensor(pixels))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)
    assert image_shape(codec, y) == (3, *size)
    assert codec.violations(as_tensor(pixels), y).item() == 0


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_the_observation_looks_like_the_decoded_file(subsampling, tmp_path):
    # Oracle: Pillow's decoder, which rounds, and interpolates averaged chroma instead of repeating it.
    pixels = np.full((32, 32, 3), (200, 90, 40), np.uint8)
    pixels[:, 16:] = (30, 60, 180)
    path, _ = written(pixels, tmp_path, 90, subsampling)
    y, codec = Jpeg().read_observation(path, 3, "cpu")
    decoded = as_tensor(np.asarray(Image.open(io.BytesIO(path.read_bytes()))))
    away = [i for i in range(32) if not 14 <= i < 18]
    torch.testing.assert_close(codec.A_dagger(y)[..., away], decoded[..., away], atol=1.6 / 255, rtol=0)


def dense_map(codec):
    """Return T of all components as one matrix over padded levels, made from unit images, in float64."""
    height, width = codec.layout.full
    count = codec.layout.channels * height * width
    units = torch.eye(count, dtype=torch.float64).view(count, codec.layout.channels, height, width)
    parts = [codec.forward_component(units, i).flatten(1) for i in range(codec.layout.channels)]
    return torch.cat(parts, 1).T


def test_components_have_the_adjoint_and_the_gain_that_the_projection_uses():
    codec = Jpeg(10, "4:2:0").draw(1, (3, 16, 16))
    matrix, row = dense_map(codec), 0
    for component in range(3):
        blocks = torch.randn(1, *(s // 8 for s in codec.layout.stored(component)), 8, 8, dtype=torch.float64)
        part = matrix[row : row + blocks.numel()]
        row += blocks.numel()
        torch.testing.assert_close(codec.adjoint_component(blocks, component).flatten(), part.T @ blocks.flatten())
        # the published weights are rounded to 9 digits
        torch.testing.assert_close(part @ part.T, codec.gain(component) * torch.eye(len(part), dtype=torch.float64))


@pytest.mark.parametrize(("shape", "subsampling"), [((1, 8, 8), "4:4:4"), ((3, 8, 8), "4:4:4"), ((3, 16, 16), "4:2:0")])
def test_the_projection_is_the_solution_of_the_quadratic_programme(shape, subsampling):
    # Oracle: min |u - z|^2 s.t. low <= T u <= high by its dual, a non-negative least-squares problem for L-BFGS-B.
    torch.manual_seed(0)
    x, codec = torch.rand(1, *shape, dtype=torch.float64), Jpeg(60, subsampling).draw(1, shape)
    y = codec.A(x)
    z = (x + 0.1 * torch.randn_like(x)).double()
    matrix = dense_map(codec).numpy()
    bounds = [torch.cat([side.flatten() for side in sides]).numpy() for sides in zip(*codec.cells(y), strict=True)]
    start = levels(z).flatten().numpy()

    def dual(both):
        low, high = np.split(both, 2)
        u = start + matrix.T @ (low - high)
        value = 0.5 * (u @ u - start @ start) - low @ bounds[0] + high @ bounds[1]
        return value, np.concatenate([matrix @ u - bounds[0], bounds[1] - matrix @ u])

    solved = scipy.optimize.minimize(
        dual, np.zeros(2 * len(matrix)), jac=True, method="L-BFGS-B", bounds=[(0, None)] * (2 * len(matrix)),
        options={"maxiter": 20000, "maxfun": 40000, "ftol": 1e-16, "gtol": 1e-9, "maxcor": 50},
    )  # fmt: skip
    low, high = np.split(solved.x, 2)
    expected = torch.from_numpy(start + matrix.T @ (low - high)).view_as(z)
    own = levels(codec.prox_l2(z, y, 1.0))
    assert (own - levels(z)).abs().max() > 3
    torch.testing.assert_close(own, expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("subsampling", FACTORS)
def test_the_projection_in_float32_is_that_in_float64(subsampling):
    torch.manual_seed(1)
    x, codec = torch.rand(2, 3, 32, 32), Jpeg(20, subsampling).draw(2, (3, 32, 32))
    y, z = codec.A(x), torch.rand(2, 3, 32, 32)
    single, double = codec.prox_l2(z, y, 1.0), codec.prox_l2(z.double(), y.double(), 1.0)
    torch.testing.assert_close(single.double(), double, atol=1e-5, rtol=0)
    assert torch.isfinite(codec.prox_l2(z.bfloat16(), y, 1.0)).all()


def test_the_gradient_of_the_projection_is_that_of_finite_differences():
    torch.manual_seed(2)
    x, codec = torch.rand(1, 3, 16, 16, dtype=torch.float64), Jpeg(40, "4:2:0").draw(1, (3, 13, 11))
    x = x[..., :13, :11]
    y, weights = codec.A(x), torch.randn_like(x)
    z = (x + 0.05 * torch.randn_like(x)).requires_grad_()
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (weights * codec.prox_l2(z, y, weight)).sum().backward()
    assert weight.grad == 0  # the indicator of a cell has no weight
    for _ in range(5):
        direction = torch.randn_like(x)
        step = 1e-6 * direction
        with torch.no_grad():
            ahead, behind = ((weights * codec.prox_l2(z + s, y, 1.0)).sum() for s in (step, -step))
        # bounded by the tolerance of the projection, relative to a change of 1e-6
        assert ((ahead - behind) / 2e-6).item() == pytest.approx((z.grad * direction).sum().item(), rel=0.02, abs=0.05)


def test_qualities_per_sample_are_those_of_a_loop():
    torch.manual_seed(3)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    codec = Jpeg([5, 90]).draw(4, (3, 24, 40), generators)
    assert len({tuple(table.flatten().tolist()) for table in codec.tables}) == 4
    x = torch.rand(4, 3, 24, 40)
    y = codec.A(x)
    z = torch.rand_like(x)
    together, fit = codec.prox_l2(z, y, 1.0), residual(codec, z, y, 0.01)
    for k in range(4):
        one = select_samples(codec, torch.tensor([k]))
        torch.testing.assert_close(one.A(x[k : k + 1]), y[k : k + 1])
        torch.testing.assert_close(one.prox_l2(z[k : k + 1], y[k : k + 1], 1.0), together[k : k + 1], atol=1e-5, rtol=0)
        torch.testing.assert_close(residual(one, z[k : k + 1], y[k : k + 1], 0.01), fit[k : k + 1])


def test_the_joint_prox_lies_in_the_cell_and_explains_the_file():
    torch.manual_seed(4)
    chelsea = next(item for item in PHOTOS if item.name == "chelsea")
    photo = load_photo(chelsea)[:, 100:164, 100:164].unsqueeze(0) / 255
    codec = Jpeg(10).draw(1, (3, 64, 64))
    y = observe(codec, photo, 0.03)
    torch.testing.assert_close(y, codec.A(photo))  # no noise is added
    z = photo + 0.1 * torch.randn_like(photo)
    u = joint_prox(codec, y, z, z, 0.5, 0.1, 1.0, 0.03)
    assert codec.violations(z, y) > 0.02
    assert codec.violations(u, y) < 0.01
    assert not misfit(codec, residual(codec, u, y, 0.03).item())
    assert "DCT coefficients" in misfit(codec, 0.2)


def test_the_surrogate_takes_the_decoded_picture_for_a_noisy_one():
    torch.manual_seed(5)
    x = torch.rand(2, 3, 20, 18)
    family = Jpeg(30, likelihood="gaussian")
    codec = family.draw(2, (3, 20, 18))
    y = codec.A(x)
    torch.testing.assert_close(y, Jpeg(30).draw(2, (3, 20, 18)).A(x))
    z, gamma = torch.rand_like(x), torch.tensor([3.0, 0.5])
    known, weight = y[..., :20, :18], gamma.view(2, 1, 1, 1)
    torch.testing.assert_close(codec.prox_l2(z, y, gamma), (z + weight * known) / (1 + weight))
    with pytest.raises(ValueError, match="likelihood must be cell or gaussian, got 'laplace'"):
        Jpeg(10, likelihood="laplace")


def test_what_cannot_be_read_is_refused(tmp_path):
    pixels = noise(16, 16)
    png, truncated, grey = tmp_path / "picture.png", tmp_path / "half.jpg", tmp_path / "grey.jpg"
    Image.fromarray(pixels).save(png)
    Image.fromarray(pixels[..., 0]).save(grey)
    with pytest.raises(ValueError, match=r"picture\.png is no JPEG file"):
        Jpeg().read_observation(png, 3, "cpu")
    with pytest.raises(ValueError, match=r"1 components .* the model needs 3"):
        Jpeg().read_observation(grey, 3, "cpu")
    truncated.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match=r"half\.jpg is not an image that can be read"):
        Jpeg().read_observation(truncated, 3, "cpu")
    with pytest.raises(ValueError, match=r"quality factor must be an integer in 1\.\.100, got 0"):
        Jpeg(0)
    with pytest.raises(ValueError, match=r"quality factor must be an integer in 1\.\.100, got 101"):
        Jpeg([5, 101])
    with pytest.raises(ValueError, match="must not be above the second"):
        Jpeg([50, 10])
    with pytest.raises(ValueError, match="subsampling must be one of 4:4:4, 4:2:2, 4:2:0, got '4:1:1'"):
        Jpeg(10, "4:1:1")
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        Jpeg().draw(1, (2, 8, 8))
    with pytest.raises(ValueError, match=r"made for images \[3, 8, 8\]"):
        Jpeg().draw(1, (3, 8, 8)).A(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="a JPEG file has no noise level"):
        estimate_sigma_y(JpegCodec(quality_tables(10, 3).unsqueeze(0), (3, 32, 32)), torch.rand(1, 3, 32, 32))
