"""Conjugate gradients against dense solves: samples of a batch that need different numbers of steps, operators without
full rank, values that are no numbers."""

import warnings
from typing import Any

import deepinv
import pytest
import torch
from deepinv.physics import LinearPhysics
from dense_prox import joint_prox
from operators import generator
from test_shipped_samples import picture
from torch import Tensor

from ud2m import PosteriorSampler
from ud2m.physics import BoundedBlur, GaussianBlur, Jpeg, MotionBlur, Observation, UniformBlur, observe
from ud2m.physics.immutable import Immutable
from ud2m.physics.iterative import ConjugateGradients, ConvergenceWarning

SHAPE = (1, 22, 21)
BLURS = {
    "gaussian, valid": GaussianBlur(1.6, boundary="valid"),
    "uniform, zero": UniformBlur(5, "zero"),
    "motion, zero": MotionBlur(7, boundary="zero"),
}
each_blur = pytest.mark.parametrize("blur", BLURS)


class Matrix(ConjugateGradients, Immutable, LinearPhysics):
    """y = M x for images [B, 1, 1, n]."""

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.matrix = matrix

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x @ self.matrix.T.to(x.dtype)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        return y @ self.matrix.to(y.dtype)


def matrix_of(physics: LinearPhysics, shape: tuple[int, int, int]) -> Tensor:
    """Return the matrix [m, n] of an operator that is the same for all samples, in float64."""
    size = torch.Size(shape).numel()
    return physics.A(torch.eye(size, dtype=torch.float64).view(size, *shape)).flatten(1).T


def dense(matrix: Tensor, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
    """Solve (A^T A + I / gamma) u = A^T y + z / gamma."""
    ridge = 1 / gamma.view(-1, 1)
    normal = matrix.T @ matrix + ridge[..., None] * torch.eye(matrix.shape[1], dtype=torch.float64)
    return torch.linalg.solve(normal, y.flatten(1) @ matrix + ridge * z.flatten(1)).view_as(z)


def problem(blur: str, count: int = 2) -> tuple[LinearPhysics, Tensor, Tensor]:
    """Return (physics, z, y) in float64."""
    family = BLURS[blur]
    physics = BoundedBlur(family.kernels(1, generator(3)), SHAPE, family.boundary)
    z, x0 = (torch.rand(count, *SHAPE, generator=generator(i), dtype=torch.float64) for i in range(2))
    return physics, z, observe(physics, x0, 0.01, generator(2))


# --- samples of one batch ------------------------------------------------------------------------------------


@pytest.mark.slow
@each_blur
@pytest.mark.parametrize("gamma", [(64.0, 1600.0), (1600.0, 1.0), (1e-3, 1e6), (1e6, 30.0)])
def test_different_weights_in_one_batch(blur, gamma):
    physics, z, y = problem(blur)
    weights = torch.tensor(gamma, dtype=torch.float64)
    expected = dense(matrix_of(physics, SHAPE), z, y, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(physics.prox_l2(z, y, weights), expected, rtol=0, atol=1e-7)
    if max(gamma) < 1e6:
        single = physics.prox_l2(z.float(), y.float(), weights.float())
        torch.testing.assert_close(single.double(), expected, rtol=0, atol=5e-4)


@each_blur
def test_a_sample_does_not_know_the_others(blur):
    physics, z, y = (t.float() if isinstance(t, Tensor) else t for t in problem(blur, 3))
    gamma = torch.tensor([1600.0, 2.0, 1e5])
    together = physics.prox_l2(z, y, gamma)
    for b in range(3):
        alone = physics.prox_l2(z[b : b + 1], y[b : b + 1], gamma[b])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=2e-6 * gamma[b].item() ** 0.5)


@pytest.mark.slow
@each_blur
def test_gradients_of_different_weights(blur):
    """Against those of the dense solution."""
    physics, z, y = problem(blur)
    matrix = matrix_of(physics, SHAPE)
    weight = torch.randn(z.shape, generator=generator(4), dtype=torch.float64)
    gamma = torch.tensor([30.0, 1e5], dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (z, y, gamma)]
    found = torch.autograd.grad((physics.prox_l2(*inputs) * weight).sum(), inputs)
    expected = torch.autograd.grad((dense(matrix, *inputs) * weight).sum(), inputs)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * theirs.abs().max().item())


def test_limits_of_the_weight():
    """Nothing is fitted with gamma = 0; with infinity y is explained, and the gradient stays finite."""
    physics = Matrix(torch.randn(5, 9, generator=generator()))
    z, y = (torch.rand(2, 1, 1, n, generator=generator(1), dtype=torch.float64) for n in (9, 5))
    inputs = [t.clone().requires_grad_() for t in (z, y)]
    u = physics.prox_l2(*inputs, torch.tensor([0.0, torch.inf]))
    assert torch.equal(u[0], z[0])
    torch.testing.assert_close(physics.A(u)[1], y[1], rtol=0, atol=1e-10)
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(u.sum(), inputs))


def test_a_gradient_that_the_operator_hardly_sees():
    """Rounding of what lies in the null space of a blur, almost all of this image, must not be taken for a residual."""
    physics, z, y = problem("gaussian, valid")
    checks = (-1.0) ** torch.arange(SHAPE[1]).view(-1, 1).add(torch.arange(SHAPE[2]))
    z.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        u = physics.prox_l2(z.float(), y.float(), 256.0)
        (slope,) = torch.autograd.grad(u, z, (checks + 0.01 * torch.rand(u.shape, generator=generator(5))))
    torch.testing.assert_close(slope.float(), checks.expand_as(slope), rtol=0, atol=0.02)


@pytest.mark.parametrize("scale", [1e-25, 1e15])
def test_scale_of_the_data(scale):
    """Squares of small numbers are 0 in float32, and those of large ones infinite."""
    physics, z, y = problem("uniform, zero")
    z, y = z.float(), y.float()
    expected = scale * physics.prox_l2(z, y, 100.0)
    torch.testing.assert_close(physics.prox_l2(scale * z, scale * y, 100.0), expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("sigma_y", [(0.01, 0.05), (0.01, 0.03)])
@pytest.mark.slow
def test_a_shipped_model_with_different_noise_levels(sigma_y):
    """Each of two observations gives what it gives beside an equal one, where nothing differs."""
    sampler = PosteriorSampler.from_pretrained("photos_general")
    x0 = torch.nn.functional.interpolate(picture(), size=40, mode="bicubic").clamp(0, 1)
    physics = GaussianBlur(1.6, boundary="valid").draw(1, (3, 40, 40))
    levels = torch.tensor(sigma_y)
    y = observe(physics, x0.repeat(2, 1, 1, 1), levels, generator(2))

    def draw(rows: Tensor) -> Tensor:
        return sampler(y[rows], physics, levels[rows], num_steps=1, generator=generator(3))

    mixed = draw(torch.tensor([0, 1]))
    assert mixed.isfinite().all()
    for b in range(2):
        torch.testing.assert_close(mixed[b], draw(torch.tensor([b, b]))[b], rtol=0, atol=1e-4)
        assert (mixed[b, 0] - x0[0]).square().mean() < 0.02


def test_projections_onto_jpeg_cells_do_not_know_the_others():
    shape = (3, 24, 24)
    codec = Jpeg(10).draw(1, shape)
    x = torch.rand(2, *shape, generator=generator())
    y = codec.A(x)
    z = torch.stack([codec.A_dagger(y)[0], 40 * x[1]])  # the first is in its cell; the second sets the scale of both
    z[0] += 0.02
    together = codec.prox_l2(z, y, 1.0)
    for b in range(2):
        assert torch.equal(together[b], codec.prox_l2(z[[b, b]], y[[b, b]], 1.0)[b])


# --- the pseudo-inverse --------------------------------------------------------------------------------------


def test_pseudo_inverses_of_random_blurs():
    """Noise that no image explains must not make the iteration diverge, however small singular values are."""
    shape = (1, 10, 11)
    for seed in range(24, 32):
        taps = (3 + seed % 3, 3 + seed // 3 % 3)
        kernel = torch.rand(1, 1, *taps, generator=generator(seed), dtype=torch.float64)
        physics = BoundedBlur(kernel / kernel.sum(), shape, "zero")
        y = torch.rand(1, *shape, generator=generator(100 + seed), dtype=torch.float64)
        x = physics.A_dagger(y)
        expected = (torch.linalg.pinv(matrix_of(physics, shape)) @ y.flatten()).view_as(y)
        assert (x - expected).norm() < 1e-6 * expected.norm(), f"{seed}, {taps}"


@pytest.mark.parametrize("size", [(30, 20), (20, 30), (25, 25)])
@pytest.mark.parametrize("consistent", [True, False])
def test_pseudo_inverses_without_full_rank(size, consistent):
    """The shortest of the best x, also where y has a part that A never gives; and its gradient."""
    u, v = (torch.randn(n, 9, generator=generator(i), dtype=torch.float64) for i, n in enumerate(size))
    matrix = u @ v.T / 25
    physics = Matrix(matrix)
    y = torch.randn(2, 1, 1, size[0], generator=generator(2), dtype=torch.float64)
    y = (physics.A(physics.A_adjoint(y)) if consistent else y).requires_grad_()
    inverse = torch.linalg.pinv(matrix, rtol=1e-10)
    x = physics.A_dagger(y)
    torch.testing.assert_close(x, y @ inverse.T, rtol=0, atol=1e-10)
    weight = torch.randn(x.shape, generator=generator(3), dtype=torch.float64)
    (slope,) = torch.autograd.grad((x * weight).sum(), y)
    torch.testing.assert_close(slope, weight @ inverse, rtol=0, atol=1e-10)
    single = physics.A_dagger(y.detach().float())
    torch.testing.assert_close(single.double(), x.detach(), rtol=0, atol=1e-4 * x.abs().max().item())


def test_a_pseudo_inverse_of_nothing():
    physics = Matrix(torch.zeros(4, 3))
    assert torch.equal(physics.A_dagger(torch.ones(2, 1, 1, 4)), torch.zeros(2, 1, 1, 3))


# --- what is no number ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["z", "y"])
def test_values_that_are_not_finite(name, wrong):
    physics, z, y = problem("gaussian, valid")
    {"z": z, "y": y}[name][1, 0, 2, 2] = wrong
    with pytest.raises(FloatingPointError, match=rf"BoundedBlur got NaN or infinity in {name} \(sample 1 of 2\)"):
        physics.prox_l2(z, y, 10.0)
    with pytest.raises(FloatingPointError, match=r"infinity in y \(sample 0 of 1\)"):
        physics.A_dagger(torch.full_like(y[:1], wrong))


@pytest.mark.parametrize("wrong", [torch.nan, -1.0])
def test_weights_that_are_none(wrong):
    physics, z, y = problem("gaussian, valid")
    with pytest.raises(FloatingPointError, match=r"NaN or negative \(sample 0 of 2\)"):
        physics.prox_l2(z, y, torch.tensor([wrong, 1.0]))


def test_an_operator_that_gives_nan_is_told():
    physics = Matrix(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]))
    with pytest.warns(ConvergenceWarning, match="residual of nan in 1 of 1 samples"):
        physics.A_dagger(torch.ones(1, 1, 1, 2))


def test_a_gradient_that_overflowed_stays_in_its_sample():
    """Losses in float16 are scaled; whoever scales them looks for what is not finite."""
    physics, z, y = problem("gaussian, valid")
    z.requires_grad_()
    weight = torch.ones_like(z)
    weight[0, 0, 0, 0] = torch.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (slope,) = torch.autograd.grad(physics.prox_l2(z, y, 10.0), z, weight)
    assert not slope[0].isfinite().all()
    assert slope[1].isfinite().all()


def test_the_worst_sample_is_told():
    physics, z, y = problem("gaussian, valid")
    physics.max_iterations = 20
    with pytest.warns(ConvergenceWarning, match=r"in 1 of 2 samples \(wanted 1e-06, at most 20 steps\)"):
        physics.prox_l2(z.float(), y.float(), torch.tensor([1.0, 1600.0]))


# --- deepinv's operators -------------------------------------------------------------------------------------


def test_operators_that_deepinv_iterates_are_solved_here():
    theirs = deepinv.physics.Blur(GaussianBlur(1.0).kernel, padding="valid")
    x0, z = (torch.rand(2, *SHAPE, generator=generator(i), dtype=torch.float64) for i in range(2))
    sigma_y = torch.tensor([0.1, 0.01], dtype=torch.float64)
    observation = Observation.of(observe(theirs, x0, sigma_y, generator(2)), theirs, sigma_y)
    assert observation.image_shape == SHAPE
    u = joint_prox(observation.physics, observation.y, z, z, torch.inf, 0.16, 1.0, sigma_y)
    expected = dense(matrix_of(theirs, SHAPE), z, observation.y, 0.16 / sigma_y**2)
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-8)
    assert observation.rows(torch.tensor([1, 1])).physics.A(z).shape == observation.y.shape


def test_closed_forms_of_deepinv_are_kept():
    theirs = deepinv.physics.Inpainting(SHAPE, mask=0.5, rng=generator())
    adopted = Observation.of(torch.rand(1, *SHAPE), theirs, 0.1).physics
    assert adopted.exact
    assert adopted.inner is theirs
    for physics in (GaussianBlur(1.0).draw(1, SHAPE), Jpeg().draw(1, SHAPE)):
        assert Observation.of(torch.rand(1, *SHAPE), physics, 0.1).physics is physics
