"""Blurs: kernels against their definitions, boundaries against plain convolution, the user's kernel files."""

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_prox import joint_prox
from operators import BATCH, generator, kernel
from PIL import Image

from ud2m.physics import (
    BoundedBlur,
    CircularBlur,
    GaussianBlur,
    KernelFile,
    MotionBlur,
    Separable,
    SuperResolution,
    UniformBlur,
    bounded_blur,
    observe,
)
from ud2m.physics.iterative import ConvergenceWarning

# --- kernels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0, 30, 90, 135])
def test_anisotropic_kernel_has_the_stated_covariance(angle):
    h = GaussianBlur((3.0, 1.2), angle=angle).kernel[0, 0]
    up = torch.arange(h.shape[0], 0, -1, dtype=torch.float64) - (h.shape[0] + 1) / 2  # rows count downwards
    right = torch.arange(h.shape[1], dtype=torch.float64) - (h.shape[1] - 1) / 2
    x, y = (h.sum(0) * right).sum(), (h.sum(1) * up).sum()
    assert (x.abs() + y.abs()).item() < 1e-9
    moments = [(h.sum(0) * right**2).sum(), (h * torch.outer(up, right)).sum(), (h.sum(1) * up**2).sum()]
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    expected = [9 * c**2 + 1.44 * s**2, (9 - 1.44) * c * s, 9 * s**2 + 1.44 * c**2]
    assert [m.item() for m in moments] == pytest.approx(expected, abs=0.12)  # the kernel is cut


@pytest.mark.parametrize(
    "make",
    [
        partial(GaussianBlur, 1e9),
        partial(GaussianBlur, [1.0, 700.0]),
        partial(SuperResolution, 10**9),
        partial(SuperResolution, 4, filter="gaussian", width=1e9),
    ],
)
def test_a_kernel_larger_than_any_picture_is_refused_before_memory_is_asked_for(make):
    with pytest.raises(ValueError, match="pixels a side, and at most 4096 are made: take a smaller width or factor"):
        make()


def test_uniform_blur_is_the_mean_over_a_box():
    x = torch.rand(2, 3, 12, 10, dtype=torch.float64, generator=generator())
    y = UniformBlur(5, boundary="valid").draw(2, (3, 12, 10)).A(x)
    torch.testing.assert_close(y, F.avg_pool2d(x, 5, stride=1), rtol=0, atol=1e-7)


def test_motion_kernels_are_trajectories_that_differ():
    kernels = MotionBlur(17).kernels(6, generator(2))
    assert kernels.shape == (6, 1, 17, 17)
    assert kernels.min() >= 0
    torch.testing.assert_close(kernels.sum((1, 2, 3)), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-4)
    assert all((kernels[i] - kernels[j]).abs().sum() > 0.5 for i in range(6) for j in range(i))
    rows = torch.arange(17) - 8.0
    for h in kernels[:, 0]:
        lit = (h > 0).double()
        assert 3 < lit.sum() < 100  # a path, not a blob that fills the square
        assert abs((h.sum(1) * rows).sum().item()) < 0.6  # the centroid is the centre
        reach = F.max_pool2d(lit[None, None], 3, stride=1, padding=1)[0, 0]
        neighbours = F.conv2d(lit[None, None], torch.ones(1, 1, 3, 3, dtype=torch.float64), padding=1)[0, 0]
        assert (neighbours[lit > 0] > 1).all(), "every pixel of a path has a neighbour on it"
        assert reach.sum() > lit.sum()


def test_longer_and_more_jagged_motion():
    def spread(blur: MotionBlur) -> float:
        h = blur.kernels(40, generator(1))[:, 0]
        offset = torch.arange(h.shape[-1]) - (h.shape[-1] - 1) / 2
        return ((h.sum(1) + h.sum(2)) * offset**2).sum(1).mean().item()

    assert spread(MotionBlur(17, spread=0.4)) > 1.5 * spread(MotionBlur(17, spread=0.2))


def test_motion_kernels_follow_the_generator_of_their_row():
    family = MotionBlur(9)
    rows = family.kernels(3, [generator(seed) for seed in (1, 2, 3)])
    torch.testing.assert_close(rows[1:2], family.kernels(1, [generator(2)]))
    assert torch.equal(family.kernels(2, generator(4)), family.kernels(2, generator(4)))
    assert not torch.equal(family.kernels(1, generator(4)), family.kernels(1, generator(5)))


# --- boundaries -------------------------------------------------------------------------------------------


def convolve(x: torch.Tensor, h: torch.Tensor, mode: str) -> np.ndarray:
    """Return scipy's direct convolution of every sample and channel."""
    from scipy.signal import convolve2d

    return np.stack([[convolve2d(c.numpy(), h[b, 0].numpy(), mode=mode) for c in sample] for b, sample in enumerate(x)])


@pytest.mark.parametrize("taps", [(5, 4), (3, 6), (1, 1)])
def test_bounded_blurs_are_plain_convolutions(taps):
    h, x = kernel(BATCH, 1, *taps), torch.rand(BATCH, 2, 9, 8, dtype=torch.float64, generator=generator())
    valid = BoundedBlur(h, (2, 9, 8), "valid").A(x)
    np.testing.assert_allclose(valid, convolve(x, h, "valid"), rtol=0, atol=1e-7)
    top, left = taps[0] // 2, taps[1] // 2
    zero = BoundedBlur(h, (2, 9, 8), "zero").A(x)
    np.testing.assert_allclose(zero, convolve(x, h, "full")[..., top : top + 9, left : left + 8], rtol=0, atol=1e-7)


@pytest.mark.parametrize("boundary", ["valid", "zero"])
@pytest.mark.parametrize(
    "kernel",
    [
        GaussianBlur((0.7, 1.2)).kernel,
        UniformBlur(4).kernels(1),
        torch.outer(torch.tensor([0.2, -1.0, 0.5]).double(), torch.tensor([0.0, 0.8, -0.3, 0.1]).double())[None, None],
    ],
)
def test_blurs_along_rows_and_columns_are_solved_in_closed_form(kernel, boundary):
    """They are scipy's convolutions, and their prox is that of conjugate gradients; in float32 too."""
    shape, (h, w) = (2, 21, 18), kernel.shape[-2:]
    closed, iterated = bounded_blur(kernel, shape, boundary), BoundedBlur(kernel, shape, boundary)
    assert type(closed) is Separable
    x, z = (torch.rand(BATCH, *shape, dtype=torch.float64, generator=generator(i)) for i in range(2))
    y = closed.A(x)
    full = convolve(x, kernel.expand(BATCH, -1, -1, -1), "full")
    top, left = (h - 1, w - 1) if boundary == "valid" else (h // 2, w // 2)
    window = full[..., top : top + y.shape[-2], left : left + y.shape[-1]]
    assert y.shape == iterated.A(x).shape
    np.testing.assert_allclose(y, window, rtol=0, atol=1e-12)
    y = y + 0.01 * torch.randn(y.shape, dtype=torch.float64, generator=generator(2))
    torch.testing.assert_close(closed.A_adjoint(y), iterated.A_adjoint(y), rtol=0, atol=1e-6)
    for gamma in (0.1, 1600.0):
        expected = iterated.prox_l2(z, y, gamma)
        torch.testing.assert_close(closed.prox_l2(z, y, gamma), expected, rtol=0, atol=2e-6)
        single = closed.prox_l2(z.float(), y.float(), gamma)
        torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-4)


def test_a_blur_in_closed_form_without_noise_leaves_out_what_it_hardly_sees():
    """Rounding of y must not grow by 1 / gains of 1e-15: the prox at gamma = inf corrects as A^dagger does."""
    physics = GaussianBlur(2.5, boundary="valid").draw(1, (1, 40, 36))
    x, z = (torch.rand(1, 1, 40, 36, generator=generator(i)) for i in range(2))
    y = physics.A(x)
    projected = physics.prox_l2(z, y, float("inf"))
    torch.testing.assert_close(projected, z + physics.A_dagger(y - physics.A(z)), rtol=0, atol=2e-2)
    torch.testing.assert_close(physics.A(projected), y, rtol=0, atol=1e-5)
    assert physics.A_dagger(y).abs().max() < 10


@pytest.mark.parametrize(
    "kernels",
    [
        GaussianBlur((0.7, 1.2), angle=30).kernel,
        GaussianBlur(0.8).kernel.expand(2, -1, -1, -1),
        GaussianBlur(0.8).kernel.expand(-1, 2, -1, -1),
        torch.tensor([[[[1.0, 2.0], [0.0, 1.0]]]]),  # its largest tap does not know the other corner
        torch.tensor([[[[0.2, -1.0, 0.0], [0.1, -0.5, 1e-6]]]]),
    ],
)
def test_other_blurs_are_solved_by_conjugate_gradients(kernels):
    assert type(bounded_blur(kernels, (2, 20, 20), "valid")) is BoundedBlur


def test_valid_pixels_do_not_know_the_boundary():
    """They are those of the circular blur that lie far enough inside."""
    x = torch.rand(1, 1, 20, 22, dtype=torch.float64, generator=generator())
    valid = GaussianBlur(1.0, boundary="valid").draw(1, (1, 20, 22)).A(x)
    reach = (20 - valid.shape[-2]) // 2
    circular = GaussianBlur(1.0).draw(1, (1, 20, 22)).A(x)
    torch.testing.assert_close(valid, circular[..., reach:-reach, reach:-reach], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "family", [GaussianBlur(1.2, boundary="valid"), UniformBlur(4, "valid"), MotionBlur(7, boundary="valid")]
)
def test_image_shape_inverts_the_shape_of_y(family):
    shape = (3, 23, 21)
    y = family.draw(1, shape, generator()).A(torch.zeros(1, *shape))
    assert y.shape[-1] < 21
    assert family.image_shape(tuple(y.shape[1:])) == shape


def test_an_iteration_that_stops_early_says_so():
    physics = BoundedBlur(GaussianBlur(1.6).kernel, (1, 32, 32), "valid")
    x = torch.rand(1, 1, 32, 32, generator=generator())
    y = observe(physics, x, 0.01, generator(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        joint_prox(physics, y, x, x, 0.2, 0.01, 1.0, 0.01)
    physics.max_iterations = 3
    with pytest.warns(ConvergenceWarning, match=r"BoundedBlur.*at most 3 steps"):
        joint_prox(physics, y, x, x, 0.2, 0.01, 1.0, 0.01)


# --- the user's kernel ------------------------------------------------------------------------------------


@pytest.fixture
def weights():
    return np.random.default_rng(0).random((5, 4)).round(2) + 0.01


def test_kernel_files(tmp_path, weights):
    np.save(tmp_path / "k.npy", weights)
    levels = np.array([[0, 10, 255], [3, 200, 7]])
    Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "k.png")
    Image.fromarray((257 * levels).astype(np.uint16)).save(tmp_path / "k16.png")
    np.testing.assert_allclose(KernelFile(tmp_path / "k.npy").kernel[0, 0], weights / weights.sum())
    for name in ("k.png", "k16.png"):
        np.testing.assert_allclose(KernelFile(tmp_path / name).kernel[0, 0], levels / levels.sum())


def test_a_kernel_file_blurs(tmp_path, weights):
    np.save(tmp_path / "k.npy", weights / weights.sum())
    x = torch.rand(2, 3, 9, 11, dtype=torch.float64, generator=generator())
    family = KernelFile(tmp_path / "k.npy", normalise=False)
    torch.testing.assert_close(
        family.draw(2, (3, 9, 11)).A(x),
        CircularBlur(torch.from_numpy(weights / weights.sum())[None, None], (3, 9, 11)).A(x),
    )
    small = KernelFile(tmp_path / "k.npy", boundary="valid").draw(2, (3, 9, 11)).A(x)
    h = torch.from_numpy(weights / weights.sum()).expand(2, 1, 5, 4)
    np.testing.assert_allclose(small, convolve(x, h, "valid"), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((3, 3)), "sums to 0"),
        (np.array([[1.0, -1.0]]), "sums to 0"),
        (np.array([[1.0, np.nan]]), "finite"),
        (np.ones((2, 3, 3)), r"matrix \[h, w\].*\[2, 3, 3\]"),
        (np.array(["a"]), "is not a whole .npy file of numbers"),
    ],
)
def test_bad_kernel_files(tmp_path, values, message):
    np.save(tmp_path / "k.npy", values)
    with pytest.raises(ValueError, match=message):
        KernelFile(tmp_path / "k.npy")


def test_other_bad_kernels(tmp_path, weights):
    np.save(tmp_path / "k.npy", weights)
    with pytest.raises(ValueError, match=r"sums to .*normalise=true"):
        KernelFile(tmp_path / "k.npy", normalise=False)
    with pytest.raises(ValueError, match=r"larger than the image .4x9"):
        KernelFile(tmp_path / "k.npy").draw(1, (1, 4, 9))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="is not an image that can be read"):
        KernelFile(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError):
        KernelFile(tmp_path / "missing.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformBlur(0), "size.*at least 1.*0"),
        (lambda: UniformBlur(2.5), "size.*integer.*2.5"),
        (lambda: UniformBlur(3, "mirror"), "boundary 'mirror'.*circular, valid, zero"),
        (lambda: MotionBlur(2), "size.*at least 3.*2"),
        (lambda: MotionBlur(9, smoothness=0.0), "smoothness must be positive"),
        (lambda: MotionBlur(9, spread=1.5), r"spread inside \(0, 1\]"),
        (lambda: GaussianBlur((1.0, 2.0, 3.0)), "width.*positive"),
        (lambda: GaussianBlur((1.0, 0.0)), "width.*positive"),
        (lambda: BoundedBlur(torch.ones(1, 1, 3, 3), (1, 8, 8), "circular"), "valid or zero here, got 'circular'"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()
