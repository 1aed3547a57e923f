import copy
import math
from pathlib import Path

import deepinv
import hydra
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from operators import BATCH, CASES, dense, generator, kernel
from torch import Tensor

import ud2m.cli  # noqa: F401  the resolvers of the pages
from ud2m.physics import (
    CircularBlur,
    CircularDownsampling,
    GaussianBlur,
    Inpainting,
    OperatorFamily,
    PixelMask,
    SuperResolution,
    adopt,
    estimate_sigma_y,
    measured,
    observe,
    per_sample,
    residual,
    select_samples,
)
from ud2m.physics.iterative import ConjugateGradients

CONF = Path(__file__).resolve().parents[1] / "conf" / "physics"
each_operator = pytest.mark.parametrize("case", CASES)


def images(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=dtype)


# --- A, A^T, A^dagger -------------------------------------------------------------------------------------


@each_operator
def test_adjoint(case):
    physics, shape = CASES[case]()
    x = images(BATCH, *shape)
    y = images(*physics.A(x).shape, seed=4)
    torch.testing.assert_close((physics.A(x) * y).sum(), (x * physics.A_adjoint(y)).sum(), rtol=1e-13, atol=0)
    assert physics.adjointness_test(x.float(), num_samples=BATCH) < 1e-5
    A = dense(physics.A, shape)
    torch.testing.assert_close(dense(physics.A_adjoint, physics.A(x).shape[1:]), A.mT, rtol=0, atol=1e-14)


@each_operator
def test_pseudo_inverse(case):
    physics, shape = CASES[case]()
    A = dense(physics.A, shape)
    pinv = dense(physics.A_dagger, physics.A(images(BATCH, *shape)).shape[1:])
    expected = torch.linalg.pinv(A, rtol=1e-5)
    torch.testing.assert_close(pinv, expected, rtol=0, atol=1e-7 * expected.abs().max().item())


@pytest.mark.parametrize("case", [case for case in CASES if case != "wide blur"])
@pytest.mark.slow
def test_moore_penrose_conditions(case):
    physics, shape = CASES[case]()
    A = dense(physics.A, shape)
    P = dense(physics.A_dagger, physics.A(images(BATCH, *shape)).shape[1:])
    for left, right in [(A @ P @ A, A), (P @ A @ P, P), ((A @ P).mT, A @ P), ((P @ A).mT, P @ A)]:
        torch.testing.assert_close(left, right, rtol=0, atol=1e-9)


@each_operator
def test_products_with_the_adjoint(case):
    physics, shape = CASES[case]()
    x = images(BATCH, *shape)
    y = images(*physics.A(x).shape)
    torch.testing.assert_close(physics.A_adjoint_A(x), physics.A_adjoint(physics.A(x)))
    torch.testing.assert_close(physics.A_A_adjoint(y), physics.A(physics.A_adjoint(y)))


@each_operator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_keep_their_dtype(case, dtype):
    physics, shape = CASES[case]()
    x = images(BATCH, *shape, dtype=torch.float32).to(dtype)
    y = physics.A(x)
    for result, expected in [
        (y, physics.A(x.float())),
        (physics.A_adjoint(y), physics.A_adjoint(y.float())),
        (physics.A_dagger(y), physics.A_dagger(y.float())),
    ]:
        assert result.dtype == dtype
        error = 2 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * 20) * expected.abs().max().item()
        if isinstance(physics, ConjugateGradients):
            error = max(error, 1e-4)  # of the iteration in float32
        if case != "wide blur":  # its pseudo-inverse amplifies rounding by up to 1e5
            torch.testing.assert_close(result.float(), expected, rtol=0, atol=error)


# --- no state ---------------------------------------------------------------------------------------------


@each_operator
def test_calls_leave_no_state(case):
    physics, shape = CASES[case]()
    x, other = images(BATCH, *shape, dtype=torch.float32), images(BATCH, *shape, dtype=torch.float64, seed=8)
    before = {name: copy.deepcopy(value) for name, value in vars(physics).items() if name != "_buffers"}
    buffers = {name: None if buffer is None else buffer.clone() for name, buffer in physics._buffers.items()}
    y = physics.A(x)
    first = [y, physics.A_adjoint(y), physics.A_dagger(y), physics.prox_l2(x, y, 10.0), physics(x)]
    for method in (physics.A, physics, physics.A_adjoint_A):
        method(other)
    physics.A_dagger(physics.A(other))
    physics.prox_l2(other, physics.A(other), torch.tensor([0.1, 100.0]))
    second = [physics.A(x), physics.A_adjoint(y), physics.A_dagger(y), physics.prox_l2(x, y, 10.0), physics(x)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert physics._buffers.keys() == buffers.keys()
    for name, buffer in physics._buffers.items():
        assert buffer is buffers[name] is None or torch.equal(buffer, buffers[name])
    after = {name: value for name, value in vars(physics).items() if name != "_buffers"}
    assert after.keys() == before.keys()
    plain = {k: v for k, v in before.items() if isinstance(v, int | float | str | tuple | None)}
    assert {k: after[k] for k in plain} == plain


@pytest.mark.parametrize(
    ("case", "update"), [("blur", "filter"), ("sr 2", "factor"), ("sr 2", "spectrum"), ("inpainting", "mask")]
)
def test_parameters_cannot_be_replaced_by_a_call(case, update):
    physics, shape = CASES[case]()
    x = images(BATCH, *shape)
    with pytest.raises(ValueError, match=f"{update}.*make a new operator"):
        physics.A(x, **{update: torch.ones(1, 1, 3, 3)})
    with pytest.raises(ValueError, match=f"{update}.*make a new operator"):
        physics.update(**{update: torch.ones(1, 1, 3, 3)})


@pytest.mark.filterwarnings("ignore:Casting complex")  # of deepinv's own buffers
@each_operator
def test_a_change_of_dtype_keeps_the_operator(case):
    physics, shape = CASES[case]()
    x = images(BATCH, *shape)
    expected = physics.A(x)
    moved = copy.deepcopy(physics).to(torch.float64)
    torch.testing.assert_close(moved.A(x), expected)


# --- Gaussian blur ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0.7, 1.0, 1.6, 2.5])
def test_blur_kernel_has_the_stated_width(width):
    point = torch.zeros(1, 1, 41, 44, dtype=torch.float64)
    point[..., 20, 22] = 1
    h = GaussianBlur(width).draw(1, (1, 41, 44)).A(point)[0, 0]
    assert h.min() > -1e-7
    assert h.sum().item() == pytest.approx(1, abs=1e-7)
    for density, centre in [(h.sum(1), 20), (h.sum(0), 22)]:
        position = torch.arange(len(density)) - centre
        assert (density * position).sum().item() == pytest.approx(0, abs=1e-5)
        assert (density * position**2).sum().sqrt().item() == pytest.approx(width, rel=0.01)


@pytest.mark.parametrize("case", ["blur", "wide blur", "blur per channel"])
def test_blur_is_deepinvs_circular_convolution(case):
    """deepinv's spatial convolution shares no code with a Fourier transform; odd kernels have one centre."""
    physics, shape = CASES[case]()
    x = images(BATCH, *shape)
    h = kernel(1, 2, 3, 5) if case == "blur per channel" else GaussianBlur(0.8 if case == "blur" else 1.6).kernel
    expected = deepinv.physics.functional.conv2d(x, h.expand(-1, shape[0], -1, -1), padding="circular")
    torch.testing.assert_close(physics.A(x), expected, rtol=0, atol=1e-7)


def test_kernel_per_sample():
    physics, shape = CASES["blur per sample"]()
    x = images(1, *shape)
    kernels = kernel(BATCH, 1, 5, 4)
    expected = torch.cat([CircularBlur(h[None], shape).A(x) for h in kernels])
    torch.testing.assert_close(physics.A(x.expand(BATCH, *shape)), expected)
    assert (expected[0] - expected[1]).abs().max() > 0.01


@pytest.mark.parametrize("case", ["blur", "blur per sample"])
def test_singular_vectors_of_deepinv_fit(case):
    """Algorithms of deepinv, such as DDRM, read U, V and mask instead of A."""
    physics, shape = CASES[case]()
    x = images(BATCH, *shape)
    torch.testing.assert_close(physics.U(physics.mask * physics.V_adjoint(x)), physics.A(x), rtol=0, atol=1e-6)


# --- super-resolution -------------------------------------------------------------------------------------


def cubic(t: float) -> float:
    """Keys, "Cubic convolution interpolation for digital image processing", 1981, equation 15."""
    t = abs(t)
    if t < 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_super_resolution_against_a_loop(factor):
    """Every pixel of y is the sum over all pixels of x by their distance to the block's centre, on the torus."""
    height, width = 4 * factor, 5 * factor
    x = images(1, 1, height, width)
    y = SuperResolution(factor).draw(1, (1, height, width)).A(x)[0, 0].numpy()

    def row(i: int, length: int) -> np.ndarray:
        centre = factor * i + (factor - 1) / 2
        reach = range(-length, 2 * length)  # the periodic images of the signal
        weights = np.zeros(length)
        for n in reach:
            weights[n % length] += cubic((n - centre) / factor)
        return weights / weights.sum()

    expected = [
        [row(i, height) @ x[0, 0].numpy() @ row(j, width) for j in range(width // factor)]
        for i in range(height // factor)
    ]
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_super_resolution_is_antialiased_bicubic_resizing(factor):
    size = 8 * factor
    x = images(2, 3, size, size)
    y = SuperResolution(factor).draw(2, (3, size, size)).A(x)
    expected = F.interpolate(x, scale_factor=1 / factor, mode="bicubic", antialias=True)
    torch.testing.assert_close(y[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_box_filter_is_the_mean_of_each_block(factor):
    x = images(2, 3, 4 * factor, 6 * factor)
    y = SuperResolution(factor, filter="box").draw(2, (3, 4 * factor, 6 * factor)).A(x)
    torch.testing.assert_close(y, F.avg_pool2d(x, factor), rtol=0, atol=1e-6)


@pytest.mark.parametrize("filter", ["bicubic", "box"])
@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_pixels_lie_on_the_centre_of_their_blocks(factor, filter):
    """A ramp keeps its values there: y[i] = (i + 1/2) factor - 1/2."""
    size = 8 * factor
    ramp = torch.arange(size, dtype=torch.float64).expand(1, 1, size, size)
    inside = slice(2, -2)
    centres = (torch.arange(8, dtype=torch.float64) + 0.5) * factor - 0.5
    physics = SuperResolution(factor, filter).draw(1, (1, size, size))
    torch.testing.assert_close(physics.A(ramp)[0, 0, 3, inside], centres[inside], rtol=0, atol=1e-4)
    torch.testing.assert_close(physics.A(ramp.mT)[0, 0, inside, 3], centres[inside], rtol=0, atol=1e-4)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_super_resolution_is_deepinvs_but_for_the_alignment(factor):
    shape = (2, 4 * factor, 5 * factor)
    x = images(1, *shape)
    theirs = deepinv.physics.Downsampling(img_size=shape, filter="bicubic", factor=factor)
    shifted = x.roll((1 - factor // 2, 1 - factor // 2), dims=(-2, -1))
    ours = SuperResolution(factor).draw(1, shape).A(x)
    torch.testing.assert_close(ours.float(), theirs.A(shifted.float()), rtol=0, atol=1e-5)


def test_decimation_without_a_filter():
    physics = CircularDownsampling(torch.ones(1, 1, 1, 1), (1, 6, 9), 3)
    x = images(1, 1, 6, 9)
    torch.testing.assert_close(physics.A(x), x[..., 1::3, 1::3], rtol=0, atol=1e-6)


# --- inpainting -------------------------------------------------------------------------------------------


def test_masks_differ_between_samples_and_keep_the_stated_share():
    mask = Inpainting(0.7).draw(4, (3, 64, 64), generator(0)).mask
    assert mask.shape == (4, 1, 64, 64)
    assert set(mask.unique().tolist()) == {0, 1}
    assert mask.mean((1, 2, 3)).tolist() == pytest.approx([0.3] * 4, abs=4 * math.sqrt(0.21 / 64**2))
    agreement = (mask[0] == mask[1]).float().mean().item()  # 0.3^2 + 0.7^2 for independent masks
    assert agreement == pytest.approx(0.58, abs=4 * math.sqrt(0.58 * 0.42 / 64**2))


def test_masks_follow_the_generator():
    family, shape = Inpainting(0.7), (3, 9, 8)
    mask = family.draw(3, shape, generator(7)).mask
    assert torch.equal(mask, family.draw(3, shape, generator(7)).mask)
    assert not torch.equal(mask, family.draw(3, shape, generator(8)).mask)
    rows = family.draw(3, shape, [generator(seed) for seed in (1, 2, 3)]).mask
    assert torch.equal(rows[1:2], family.draw(1, shape, [generator(2)]).mask)


def test_no_mask_misses_everything():
    mask = Inpainting(0.999).draw(500, (1, 2, 2), generator(0)).mask
    assert mask.sum((1, 2, 3)).min() == 1


def test_mask_is_applied():
    x = images(2, 3, 5, 6)
    physics = Inpainting(0.5).draw(2, (3, 5, 6), generator(0))
    known = physics.mask.expand(2, 3, 5, 6) == 1
    assert torch.equal(physics.A(x)[known], x[known])
    assert (physics.A(x)[~known] == 0).all()


# --- measurements -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [GaussianBlur(), SuperResolution(2), Inpainting(0.6)])
def test_observation_noise_and_residual(family):
    shape, sigma_y = (3, 96, 96), torch.tensor([0.01, 0.2])
    physics = family.draw(2, shape, generator(0))
    x = images(2, *shape, dtype=torch.float32)
    y = observe(physics, x, sigma_y, generator(1))
    real = measured(physics, y).expand_as(y) == 1
    for b in range(2):
        noise = (y - physics.A(x))[b][real[b]]
        count = len(noise)
        assert noise.std().item() == pytest.approx(sigma_y[b].item(), rel=4 / math.sqrt(2 * count))
        assert noise.mean().item() == pytest.approx(0, abs=4 * sigma_y[b].item() / math.sqrt(count))
        assert residual(physics, x, y, sigma_y)[b].item() == pytest.approx(1, abs=4 / math.sqrt(2 * count))
    assert (y[~real] == 0).all()
    torch.testing.assert_close(residual(physics, x, y, sigma_y / 2), 2 * residual(physics, x, y, sigma_y))


@pytest.mark.parametrize("sigma_y", [0.01, 0.05])
@pytest.mark.parametrize("family", [GaussianBlur(1.6), GaussianBlur(1.6, boundary="valid"), SuperResolution(2)])
def test_the_noise_of_an_observation_is_estimated(family, sigma_y):
    from skimage import data

    pixels = torch.from_numpy(np.stack([data.chelsea()[:256, :256], data.coffee()[:256, :256]]))
    x = pixels.permute(0, 3, 1, 2) / 255
    physics = family.draw(2, (3, 256, 256))
    estimate = estimate_sigma_y(physics, observe(physics, x, sigma_y, generator(1)))
    assert estimate.shape == (2,)
    assert (estimate / sigma_y - 1).abs().max() < 0.1


def test_the_noise_of_holes_is_not_estimated():
    physics = Inpainting(0.5).draw(1, (1, 32, 32), generator(0))
    with pytest.raises(ValueError, match="missing entries cannot be estimated; give sigma_y"):
        estimate_sigma_y(physics, physics.A(images(1, 1, 32, 32)))
    with pytest.raises(ValueError, match=r"at least 32x32 pixels, got \[1, 31, 40\]"):
        estimate_sigma_y(physics, images(1, 1, 31, 40))


def test_residual_by_hand():
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).view(1, 1, 2, 2)
    physics = PixelMask(mask, (1, 2, 2))
    x = torch.tensor([[[[0.5, 0.9], [0.5, 0.5]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    y = torch.tensor([[[[0.6, 0.0], [0.5, 0.7]]], [[[0.3, 0.0], [0.0, 0.0]]]])
    expected = [math.sqrt(0.1**2 + 0.2**2) / (0.1 * math.sqrt(3)), 0.3 / (0.5 * math.sqrt(3))]
    assert residual(physics, x, y, torch.tensor([0.1, 0.5])).tolist() == pytest.approx(expected)


def test_observation_follows_the_generator():
    x, physics = images(2, 1, 16, 16), GaussianBlur().draw(2, (1, 16, 16))
    y = observe(physics, x, 0.1, generator(1))
    assert y.dtype == x.dtype
    assert torch.equal(y, observe(physics, x, 0.1, generator(1)))
    assert not torch.equal(y, observe(physics, x, 0.1, generator(2)))
    assert torch.equal(observe(physics, x, 0.0, generator(1)), physics.A(x))
    rows = observe(physics, x, 0.1, [generator(1), generator(2)])
    torch.testing.assert_close(rows[1:], observe(physics, x[1:], 0.1, [generator(2)]))


def test_any_deepinv_mask_is_understood():
    theirs = deepinv.physics.Inpainting((1, 64, 64), mask=0.25, rng=generator(0))
    x = images(2, 1, 64, 64, dtype=torch.float32)
    y = observe(theirs, x, 0.1, generator(1))
    assert (y[:, :, theirs.mask[0, 0] == 0] == 0).all()
    assert residual(theirs, x, y, 0.1).tolist() == pytest.approx([1, 1], abs=4 / math.sqrt(2 * 1000))


# --- samples of a batch -----------------------------------------------------------------------------------


@each_operator
def test_select_samples(case):
    physics, shape = CASES[case]()
    x = images(3, *shape)
    index = torch.tensor([1, 0, 1])
    rows = [physics.A(x[i : i + 1].expand(BATCH, *shape))[index[i]] for i in range(3)]
    selected = select_samples(physics, index)
    torch.testing.assert_close(selected.A(x), torch.stack(rows))
    torch.testing.assert_close(select_samples(physics, index[:1]).A(x[:1])[0], rows[0])
    if case == "mixture":
        return  # its parts come in another order
    own, shared = dict(physics.named_buffers()), dict(selected.named_buffers())
    common = [name for name in own if own[name].ndim < 4 or len(own[name]) == 1]
    assert all(shared[name].data_ptr() == own[name].data_ptr() for name in common)


def test_select_samples_of_a_deepinv_operator():
    mask = (images(3, 1, 4, 5) > 0.5).float()
    theirs = deepinv.physics.Inpainting((2, 4, 5), mask=mask)
    x = images(2, 2, 4, 5, dtype=torch.float32)
    ours = adopt(theirs, images(3, 2, 4, 5))
    torch.testing.assert_close(select_samples(ours, torch.tensor([2, 0])).A(x), mask[[2, 0]] * x)
    assert torch.equal(theirs.mask, mask)


def test_per_sample_shapes():
    like = torch.zeros(3, 2, 4, 4, dtype=torch.float64)
    for one in (0.1, torch.tensor(0.1, dtype=torch.float64), torch.full((1,), 0.1, dtype=torch.float64)):
        assert torch.equal(per_sample(one, like), torch.tensor(0.1, dtype=torch.float64))
    assert per_sample(torch.ones(3), like).shape == (3, 1, 1, 1)
    assert per_sample(torch.ones(3, 1, 1, 1), like).shape == (3, 1, 1, 1)
    for wrong in (torch.ones(2), torch.ones(4, 4), torch.ones(1, 3)):
        with pytest.raises(ValueError, match="per sample"):
            per_sample(wrong, like)


# --- configuration and bad input --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gaussian_blur", GaussianBlur), ("super_resolution", SuperResolution), ("inpainting", Inpainting)],
)
def test_configs_instantiate(name, expected):
    config = OmegaConf.load(CONF / f"{name}.yaml")
    assert {"operator", "sigma_y"} <= set(config)
    assert config.sigma_y == 0.01
    family = hydra.utils.instantiate(config.operator)
    assert type(family) is expected
    assert isinstance(family, OperatorFamily)
    x = images(2, 3, 32, 32, dtype=torch.float32)
    assert family.draw(2, (3, 32, 32), generator(0)).A(x).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianBlur(0.0), "width.*positive.*0"),
        (lambda: GaussianBlur(-1.0), "width.*positive.*-1"),
        (lambda: GaussianBlur(math.nan), "width.*positive.*nan"),
        (lambda: GaussianBlur(math.inf), "width.*positive.*inf"),
        (lambda: SuperResolution(1), "factor.*at least 2.*1"),
        (lambda: SuperResolution(2.5), "factor.*integer.*2.5"),
        (lambda: SuperResolution(4, "lanczos"), "lanczos.*bicubic, box"),
        (lambda: Inpainting(0.0), "missing.*inside.*0"),
        (lambda: Inpainting(1.0), "missing.*inside.*1"),
        (lambda: Inpainting(math.nan), "missing.*inside.*nan"),
        (lambda: CircularBlur(torch.ones(3, 3), (1, 8, 8)), r"kernel must be.*\[3, 3\]"),
        (lambda: CircularBlur(torch.ones(1, 3, 3, 3), (1, 8, 8)), "kernel must be"),
        (lambda: CircularBlur(torch.full((1, 1, 3, 3), math.nan), (1, 8, 8)), "finite"),
        (lambda: CircularDownsampling(torch.ones(1, 1, 3, 3), (1, 8, 8), 2), "even number of taps"),
        (lambda: CircularDownsampling(torch.ones(1, 1, 3, 3), (1, 8, 8), 0), "factor.*at least 1"),
        (lambda: PixelMask(torch.zeros(2, 1, 4, 4), (1, 4, 4)), "every pixel is missing"),
        (lambda: PixelMask(torch.full((1, 1, 4, 4), 0.5), (1, 4, 4)), "binary"),
        (lambda: PixelMask(torch.full((1, 1, 4, 4), math.nan), (1, 4, 4)), "binary"),
        (lambda: PixelMask(torch.ones(1, 1, 4, 5), (1, 4, 4)), r"mask must be.*\[1, 1, 4, 5\]"),
        (lambda: PixelMask(torch.ones(1, 3, 4, 4), (1, 4, 4)), "mask must be"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("family", "shape", "message"),
    [
        (SuperResolution(4), (3, 30, 32), "factor 4 does not divide.*30x32"),
        (SuperResolution(4), (3, 32, 30), "factor 4 does not divide.*32x30"),
        (SuperResolution(4), (3, 8, 32), "kernel .16x16.*larger than the image .8x32"),
        (GaussianBlur(1.6), (3, 12, 32), "kernel .13x13.*larger than the image .12x32"),
        (GaussianBlur(1.6), (32, 32), "image_shape"),
        (Inpainting(), (3, 0, 32), "image_shape"),
    ],
)
def test_bad_sizes(family, shape, message):
    with pytest.raises(ValueError, match=message):
        family.check(shape)
    with pytest.raises(ValueError, match=message):
        family.draw(1, shape)


@pytest.mark.parametrize(
    ("family", "shape"),
    [(SuperResolution(4), (3, 32, 48)), (GaussianBlur(1.6), (1, 13, 13)), (Inpainting(), (1, 1, 1))],
)
def test_good_sizes(family, shape):
    family.check(shape)
    assert family.draw(2, shape).A(torch.ones(2, *shape)).isfinite().all()


@each_operator
def test_images_of_another_size_are_refused(case):
    physics, (*first, height, width) = CASES[case]()
    for method in (physics.A, physics.A_adjoint):
        with pytest.raises(ValueError, match="got"):
            method(torch.ones(BATCH, *first, height + 12, width))


def test_bad_noise_levels():
    physics = GaussianBlur().draw(1, (1, 16, 16))
    x = images(1, 1, 16, 16)
    with pytest.raises(ValueError, match="sigma_y must not be negative"):
        observe(physics, x, -0.1)
    with pytest.raises(ValueError, match="sigma_y must not be negative, got nan"):
        observe(physics, x, math.nan)
    with pytest.raises(ValueError, match="sigma_y must be positive"):
        residual(physics, x, x, 0.0)
