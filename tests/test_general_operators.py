"""Denoising, colorization, the Gaussian filter of super-resolution, and deepinv's operators by name."""

import math

import deepinv
import numpy as np
import pytest
import torch
from dense_prox import DELTA, LAM, SIGMA, SIGMA_Y, dense_prox, joint_prox, problem
from operators import BATCH, dense, generator

from ud2m.images import LUMINANCE
from ud2m.physics import Colorization, DeepinvOperator, Denoising, SuperResolution, observe, residual


def test_denoising_sees_every_pixel():
    x = torch.rand(2, 3, 5, 6, generator=generator())
    physics = Denoising().draw(2, (3, 5, 6))
    assert torch.equal(physics.A(x), x)
    u = physics.prox_l2(torch.zeros_like(x), x, 3.0)
    torch.testing.assert_close(u, 0.75 * x)


def test_luminance_is_pils():
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    y = Colorization().draw(1, (3, 9, 7)).A(x)
    assert y.shape == (1, 1, 9, 7)
    assert (255 * y[0, 0] - torch.from_numpy(grey.copy())).abs().max() < 1
    assert sum(LUMINANCE) == pytest.approx(1)
    assert Colorization().image_shape((1, 9, 7)) == (3, 9, 7)
    with pytest.raises(ValueError, match="3 channels, got 1"):
        Colorization().check((1, 8, 8))


@pytest.mark.parametrize("factor", [2, 3, 4, 8, 16])
def test_gaussian_filter_of_super_resolution(factor):
    """The response to a pixel, seen from all pixels of y, has the stated width and its centre on the blocks' grid."""
    side = 8 * factor
    physics = SuperResolution(factor, "gaussian").draw(1, (1, side, side))
    i = 4
    row = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    row[0, 0, i, i] = 1
    weights = physics.A_adjoint(row)[0, 0].sum(1)  # of the pixels of x in pixel i of y
    centre = (i + 0.5) * factor - 0.5
    offset = torch.arange(side) - centre
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)
    assert (weights * offset).sum().item() == pytest.approx(0, abs=1e-4)
    assert (weights * offset**2).sum().sqrt().item() == pytest.approx(0.4 * factor, rel=0.02)


def test_width_belongs_to_the_gaussian_filter():
    wide = SuperResolution(4, "gaussian", width=3.0)
    assert wide.kernel.shape[-1] > SuperResolution(4, "gaussian").kernel.shape[-1]
    for arguments in [(4, "bicubic", 1.0), (4, "gaussian", 0.0), (4, "gaussian", math.inf)]:
        with pytest.raises(ValueError, match="width must be positive, and belongs to filter=gaussian"):
            SuperResolution(*arguments)


# --- deepinv's operators ----------------------------------------------------------------------------------

MRI = {"mask": (torch.rand(9, 8, generator=generator(1)) < 0.5).float()}
ADOPTED = {
    "mri": (lambda: DeepinvOperator("MRI", MRI), (2, 9, 8)),
    "compressed sensing": (lambda: DeepinvOperator("CompressedSensing", {"m": 20, "dtype": torch.float64}), (1, 6, 7)),
}


@pytest.mark.parametrize("name", ADOPTED)
def test_adopted_operators_have_an_exact_prox(name):
    make, shape = ADOPTED[name]
    physics = make().draw(BATCH, shape)
    y, x_sigma, x = problem(physics, shape)
    expected = dense_prox(dense(physics.A, shape), y, x_sigma, x, SIGMA, DELTA, LAM, SIGMA_Y)
    u = joint_prox(physics, y, x_sigma, x, SIGMA, DELTA, LAM, SIGMA_Y)
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-9)


def test_tomography_has_an_exact_prox():
    """deepinv's is computed in float32 only."""
    physics = DeepinvOperator("Tomography", {"angles": 9, "normalize": True}).draw(BATCH, (1, 8, 8))
    y, x_sigma, x = problem(physics, (1, 8, 8))
    expected = dense_prox(dense(physics.A, (1, 8, 8)), y, x_sigma, x, SIGMA, DELTA, LAM, SIGMA_Y)
    u = joint_prox(physics, *(t.float() for t in (y, x_sigma, x, SIGMA, DELTA, LAM, SIGMA_Y)))
    torch.testing.assert_close(u.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ADOPTED)
def test_gradients_through_the_iteration(name):
    """Implicit differentiation against finite differences."""
    make, shape = ADOPTED[name]
    physics = make().draw(BATCH, shape)
    pixels = [t.requires_grad_() for t in problem(physics, shape)]
    parameters = [p.clone().requires_grad_() for p in (SIGMA, DELTA, LAM, SIGMA_Y)]
    weight = torch.randn(BATCH, *shape, generator=generator(4), dtype=torch.float64)

    def projected(*arguments):
        return (joint_prox(physics, *arguments) * weight).sum((1, 2, 3))

    assert torch.autograd.gradcheck(projected, (*pixels, *parameters), rtol=1e-3, atol=1e-6, fast_mode=True)


def test_mri_is_the_masked_fourier_transform_of_a_complex_image():
    x = torch.rand(1, 2, 9, 8, generator=generator())
    y = DeepinvOperator("MRI", MRI).draw(1, (2, 9, 8)).A(x)
    image = np.fft.ifftshift(x[0, 0].numpy() + 1j * x[0, 1].numpy())
    spectrum = np.fft.fftshift(np.fft.fft2(image, norm="ortho")) * MRI["mask"].numpy()
    np.testing.assert_allclose(y[0, 0].numpy() + 1j * y[0, 1].numpy(), spectrum, atol=1e-5)


def test_observations_of_adopted_operators():
    physics = DeepinvOperator("Tomography", {"angles": 40, "normalize": True}).draw(2, (1, 32, 32))
    x = torch.rand(2, 1, 32, 32, generator=generator())
    with torch.autocast("cpu", torch.bfloat16):
        y = observe(physics, x, 0.02, generator(1))
    assert residual(physics, x, y, 0.02).tolist() == pytest.approx([1, 1], abs=0.1)


def test_parameters_from_a_file(tmp_path):
    np.save(tmp_path / "mask.npy", MRI["mask"].numpy())
    x = torch.rand(1, 2, 9, 8, generator=generator())
    from_file = DeepinvOperator("MRI", {"mask": str(tmp_path / "mask.npy")}).draw(1, (2, 9, 8))
    assert torch.equal(from_file.A(x), DeepinvOperator("MRI", MRI).draw(1, (2, 9, 8)).A(x))


def test_no_call_changes_an_adopted_operator():
    physics = DeepinvOperator("MRI", MRI).draw(1, (2, 9, 8))
    x = torch.rand(1, 2, 9, 8, generator=generator())
    before = physics.A(x)
    with pytest.raises(ValueError, match="make a new operator"):
        physics.A(x, y_shape=(1,))
    physics.A(x, mask=torch.ones(9, 8))  # not a parameter of the adopted operator, and not passed on
    assert torch.equal(physics.A(x), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Tomografy",), "no linear operator 'Tomografy'; it has .*Tomography"),
        (("PhaseRetrieval",), "no linear operator 'PhaseRetrieval'"),
        (("Tomography", {"angle": 3}), "no parameter angle; it has angles"),
    ],
)
def test_operators_that_deepinv_does_not_have(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeepinvOperator(*arguments)


def test_images_that_an_adopted_operator_does_not_take():
    with pytest.raises(ValueError, match=r"deepinv's MRI with mask does not take images \(2, 8, 8\)"):
        DeepinvOperator("MRI", MRI).draw(1, (2, 8, 8))
    with pytest.raises(ValueError, match="deepinv's Tomography with no parameters does not take"):
        DeepinvOperator("Tomography").draw(1, (1, 8, 8))
    assert DeepinvOperator("MRI", MRI, size=[2, 9, 8]).image_shape((1, 1, 1)) == (2, 9, 8)
    assert hasattr(deepinv.physics, "MRI")
