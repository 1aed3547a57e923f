"""The operators of the DDRM / I2SB protocol against values derived from its public code by hand."""

import math

import numpy as np
import pytest
import torch

from ud2m.physics import DdrmBlur, DdrmJpeg, DdrmSuperResolution, Inpainting, MaskCollection, SuperResolution
from ud2m.physics.ddrm import bicubic_matrix, blur_matrix
from ud2m.physics.problem import Problem

SIDE = 24


def image(channels=3, side=SIDE, seed=0):
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truncated(matrix):
    """Return a matrix without its singular values below 0.03."""
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, : len(s)] * np.where(s < 0.03, 0, s)) @ vt[: len(s)]


def test_a_row_of_the_uniform_blur_has_eight_taps_of_a_ninth_and_reaches_one_further_to_the_left():
    matrix = blur_matrix((1 / 9,) * 9, SIDE)
    expected = np.zeros((SIDE, SIDE))
    for row in range(SIDE):
        for column in range(row - 4, row + 4):  # nine taps would end at row + 5
            if 0 <= column < SIDE:
                expected[row, column] = 1 / 9
    np.testing.assert_allclose(matrix.numpy(), expected)
    assert matrix[12].sum() == pytest.approx(8 / 9)


def test_a_row_of_the_gaussian_blur_has_four_of_its_five_taps():
    weights = [math.exp(-0.5 * (k / 10) ** 2) for k in (-2, -1, 0, 1, 2)]
    x = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.float64)
    x[..., 12, 12] = 1
    y = DdrmBlur("gaussian", mixed=False).draw(1, (1, SIDE, SIDE)).A(x)[0, 0]
    # no singular value of this kernel below the threshold can change more than the threshold itself
    column = np.array([weights[12 - row + 2] / sum(weights) if 0 <= 12 - row + 2 < 4 else 0 for row in range(SIDE)])
    assert np.abs(y.numpy() - np.outer(column, column)).max() < 0.03
    assert y.argmax() // SIDE in (12, 13)


@pytest.mark.parametrize(("kernel", "taps"), [("uniform", 9), ("gaussian", 5)])
def test_the_blur_that_was_meant_is_the_truncated_matrix_on_rows_and_columns(kernel, taps):
    weights = np.array([1 / 9] * 9 if kernel == "uniform" else [math.exp(-(k**2) / 200) for k in (-2, -1, 0, 1, 2)])
    matrix = np.zeros((SIDE, SIDE))
    for row in range(SIDE):
        for tap in range(2 * (taps // 2)):
            if 0 <= row + tap - taps // 2 < SIDE:
                matrix[row, row + tap - taps // 2] = weights[tap] / weights.sum()
    matrix, x = truncated(matrix), image()
    y = DdrmBlur(kernel, mixed=False).draw(2, (3, SIDE, SIDE)).A(x)
    np.testing.assert_allclose(y.numpy(), matrix @ x.numpy() @ matrix.T, atol=1e-10)


def test_gains_are_dealt_out_as_the_public_code_does_it():
    # Oracle: its chain written out: components by falling gain, channels side by side; gains channel after channel.
    x, side = image(), SIDE
    u, s, vt = torch.linalg.svd(blur_matrix((1 / 9,) * 9, side))
    s = torch.where(s < 0.03, 0, s)
    gains, order = torch.outer(s, s).flatten().sort(descending=True)
    vector = (vt @ x @ vt.T).flatten(2)[:, :, order].permute(0, 2, 1).flatten(1) * torch.cat([gains] * 3)
    back = torch.zeros(2, side**2, 3, dtype=torch.float64)
    back[:, order] = vector.view(2, side**2, 3)
    expected = u @ back.permute(0, 2, 1).reshape(2, 3, side, side) @ u.T
    y = DdrmBlur("uniform").draw(2, (3, side, side)).A(x)
    # equal gains can be sorted either way
    torch.testing.assert_close(y, expected, atol=0.02, rtol=0)
    assert (y - expected).square().mean().sqrt() < 1e-3
    meant = DdrmBlur("uniform", mixed=False).draw(2, (3, side, side)).A(x)
    assert (y - meant).square().mean().sqrt() > 0.05


def test_bicubic_decimation_is_sixteen_keys_taps_over_mirrored_borders():
    def keys(t, a=-0.5):
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0

    taps = [keys((k - 7.5) / 4) for k in range(16)]
    expected = np.zeros((SIDE // 4, SIDE))
    for row in range(SIDE // 4):
        for tap, weight in enumerate(taps):
            place = 4 * row + 2 - 8 + tap
            place = -place - 1 if place < 0 else place
            place = 2 * SIDE - 1 - place if place >= SIDE else place
            expected[row, place] += weight / sum(taps)
    np.testing.assert_allclose(bicubic_matrix(4, SIDE).numpy(), expected, atol=1e-12)
    matrix, x = truncated(expected), image()
    y = DdrmSuperResolution().draw(2, (3, SIDE, SIDE)).A(x)
    np.testing.assert_allclose(y.numpy(), matrix @ x.numpy() @ matrix.T, atol=1e-10)


def test_pooling_is_the_mean_of_each_block():
    x = image()
    y = SuperResolution(4, "box").draw(2, (3, SIDE, SIDE)).A(x)
    torch.testing.assert_close(y, torch.nn.functional.avg_pool2d(x, 4))


def test_its_jpeg_takes_one_chroma_pixel_of_four_and_rounds_coefficients_alone():
    scipy_fft = pytest.importorskip("scipy.fft")
    x = image(side=16)
    pixels = 255 * x.numpy()
    weights = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    ycc = np.einsum("dc,bchw->bdhw", weights, pixels)
    tables = np.array([80, 55, 50, 80, 120, 200, 255, 255]), np.array([85, 90, 120, 235, 255, 255, 255, 255])
    planes = []
    codec = DdrmJpeg().draw(2, (3, 16, 16))
    for component, plane in enumerate((ycc[:, 0] - 128, ycc[:, 1, ::2, ::2], ycc[:, 2, ::2, ::2])):
        table = codec.tables[0, component].double().numpy()
        np.testing.assert_array_equal(table[0], tables[min(component, 1)])
        decoded = np.empty_like(plane)
        for i in range(0, plane.shape[1], 8):
            for j in range(0, plane.shape[2], 8):
                k = np.round(scipy_fft.dctn(plane[:, i : i + 8, j : j + 8], axes=(1, 2), norm="ortho") / table)
                decoded[:, i : i + 8, j : j + 8] = scipy_fft.idctn(k * table, axes=(1, 2), norm="ortho")
        planes.append(decoded if component == 0 else decoded.repeat(2, 1).repeat(2, 2))
    planes[0] += 128
    expected = np.einsum("dc,bchw->bdhw", np.linalg.inv(weights), np.stack(planes, 1)) / 255
    y = codec.A(x)
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-6)
    assert (codec.violations(x, y) == 0).all()
    # the projection leaves what explains y where it is, and brings the rest into the cell
    torch.testing.assert_close(codec.prox_l2(y, y, 1.0), y, atol=1e-5, rtol=0)
    assert codec.violations(codec.prox_l2(x + 0.1, y, 1.0), y).max() < 0.002


def test_masks_of_a_collection_are_unpacked_in_their_order(tmp_path):
    holes = np.random.default_rng(0).random((5, 12, 12)) < 0.3
    path = tmp_path / "masks.npz"
    np.savez(path, **{"20-30% freeform": np.packbits(holes.astype(np.uint8))})
    family = MaskCollection(path, size=12)
    drawn = family.draw(40, (3, 12, 12), torch.Generator().manual_seed(0)).mask[:, 0].bool()
    numbers = [next(n for n in range(5) if np.array_equal(mask.numpy(), ~holes[n])) for mask in drawn]
    assert set(numbers) == set(range(5))
    with pytest.raises(ValueError, match=r"no masks named 'x'; choose one of 20-30% freeform"):
        MaskCollection(path, key="x")
    with pytest.raises(ValueError, match="does not hold masks of 256x256"):
        MaskCollection(path)
    with pytest.raises(ValueError, match="masks have 12x12 pixels, got 8x8"):
        family.draw(1, (3, 8, 8))
    (tmp_path / "text.npz").write_text("no masks")
    with pytest.raises(ValueError, match=r"text\.npz is not a whole \.npz file of numbers"):
        MaskCollection(tmp_path / "text.npz")


def test_a_problem_can_be_free_of_noise_while_methods_are_told_a_level():
    x0 = image().float()
    problem = Problem(Inpainting(0.5), 0.05, noise=0.0)
    observation = problem.observe(x0)
    torch.testing.assert_close(observation.y, observation.physics.A(x0))
    assert observation.sigma_y.tolist() == pytest.approx([0.05] * len(x0))


def test_what_the_protocol_does_not_take_is_refused():
    with pytest.raises(ValueError, match="kernel must be one of uniform, gaussian, got 'box'"):
        DdrmBlur("box")
    with pytest.raises(ValueError, match="square images, got 8x12"):
        DdrmBlur().draw(1, (3, 8, 12))
    with pytest.raises(ValueError, match="square images, got 8x12"):
        DdrmSuperResolution().draw(1, (3, 8, 12))
    with pytest.raises(ValueError, match="the factor 4 must divide the side"):
        DdrmSuperResolution().draw(1, (3, 18, 18))
    with pytest.raises(ValueError, match="factor must be an integer of at least 2, got 1"):
        DdrmSuperResolution(1)
