import math

import deepinv
import pytest
import torch
from deepinv.physics import LinearPhysics
from deepinv.physics.functional import bicubic_filter
from dense_prox import DELTA, LAM, SIGMA, SIGMA_Y, dense_prox, joint_prox, problem
from operators import BATCH, CASES, dense, generator
from torch import Tensor

from ud2m.physics import CircularBlur, GaussianBlur, Inpainting, Observation, SuperResolution, observe, select_samples

each_operator = pytest.mark.parametrize("case", CASES)
PARAMETERS = ("sigma", "delta", "lam", "sigma_y")


@each_operator
def test_prox_is_the_dense_solution(case):
    physics, shape = CASES[case]()
    y, x_sigma, x = problem(physics, shape)
    u = joint_prox(physics, y, x_sigma, x, SIGMA, DELTA, LAM, SIGMA_Y)
    expected = dense_prox(dense(physics.A, shape), y, x_sigma, x, SIGMA, DELTA, LAM, SIGMA_Y)
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-10)


@each_operator
def test_gradient_of_the_objective_is_zero(case):
    physics, shape = CASES[case]()
    y, x_sigma, x = problem(physics, shape)
    u = joint_prox(physics, y, x_sigma, x, SIGMA, DELTA, LAM, SIGMA_Y).requires_grad_()
    terms = [
        (y - physics.A(u)).square().flatten(1).sum(1) / (2 * LAM * SIGMA_Y**2),
        (u - x_sigma).square().flatten(1).sum(1) / (2 * SIGMA**2),
        (u - x).square().flatten(1).sum(1) / (2 * DELTA),
    ]
    parts = [torch.autograd.grad(term.sum(), u, retain_graph=True)[0] for term in terms]
    assert all(part.abs().max() > 0.1 for part in parts)
    torch.testing.assert_close(sum(parts), torch.zeros_like(u), rtol=0, atol=1e-8)


@each_operator
def test_an_observation_prepares_its_prox_once_for_all_weights(case):
    physics, shape = CASES[case]()
    y, z, other = problem(physics, shape)
    observation = Observation(y, physics, SIGMA_Y)
    with torch.no_grad():
        prepared = observation.prox
    assert observation.prox is prepared
    for gamma in (torch.tensor([3.0, 500.0]).double(), torch.tensor([40.0, 0.2]).double()):
        solve = prepared(gamma)
        for x in (z, other):
            # argmin gamma |A u - y|^2 / 2 + |u - x|^2 / 2
            A, flat = dense(physics.A, shape), x.flatten(1).unsqueeze(-1)
            matrix = gamma.view(-1, 1, 1) * A.mT @ A + torch.eye(A.shape[-1])
            right = gamma.view(-1, 1, 1) * A.mT @ y.flatten(1).unsqueeze(-1) + flat
            torch.testing.assert_close(solve(x), torch.linalg.solve(matrix, right).view_as(x), rtol=0, atol=1e-9)
    # a gradient still reaches y, and anew in every pass
    y.requires_grad_()
    for _ in range(2):
        assert torch.autograd.grad(observation.prox(gamma)(z).sum(), y)[0].abs().max() > 0.01


@each_operator
def test_gradients(case):
    """Of every argument, per sample, against finite differences."""
    physics, shape = CASES[case]()
    pixels = [t.requires_grad_() for t in problem(physics, shape)]
    parameters = [p.clone().requires_grad_() for p in (SIGMA, DELTA, LAM, SIGMA_Y)]
    # Few random projections keep the Jacobian small without hiding any entry.
    weights = torch.randn(BATCH, *shape, 3, generator=generator(4), dtype=torch.float64)

    def projected(*arguments: Tensor) -> Tensor:
        return torch.einsum("b...,b...k->bk", joint_prox(physics, *arguments), weights)

    def of_parameters(*values: Tensor) -> Tensor:
        return projected(*(t.detach() for t in pixels), *values)

    assert torch.autograd.gradcheck(of_parameters, parameters, rtol=1e-4, atol=1e-6)
    assert torch.autograd.gradcheck(projected, (*pixels, *parameters), rtol=1e-4, atol=1e-6, fast_mode=True)


@each_operator
def test_parameters_per_sample_equal_a_loop(case):
    physics, shape = CASES[case]()
    y, x_sigma, x = problem(physics, shape)
    together = joint_prox(physics, y, x_sigma, x, SIGMA, DELTA, LAM, SIGMA_Y)
    for b in range(BATCH):
        single, one = select_samples(physics, torch.tensor([b])), slice(b, b + 1)
        numbers = [p[b].item() for p in (SIGMA, DELTA, LAM, SIGMA_Y)]
        alone = joint_prox(single, y[one], x_sigma[one], x[one], *numbers)
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", [float, lambda v: torch.tensor(v), lambda v: torch.tensor([v])])
def test_one_number_serves_all_samples(form):
    for case in CASES:
        physics, shape = CASES[case]()
        y, x_sigma, x = problem(physics, shape)
        numbers = (0.25, 0.0625, 2.0, 0.125)  # exact in float32
        expected = joint_prox(physics, y, x_sigma, x, *(torch.full((BATCH, 1, 1, 1), v) for v in numbers))
        torch.testing.assert_close(joint_prox(physics, y, x_sigma, x, *map(form, numbers)), expected)


# --- limits and precision ---------------------------------------------------------------------------------


# Where gains come close to 0, the limit is not reached at 1e-6 yet.
@pytest.mark.parametrize(
    ("case", "sigma_y"),
    [
        (case, sigma_y)
        for case in CASES
        for sigma_y in (1e-6, 1e-12, 1e-30, 0.0)
        if case != "wide blur" and not (sigma_y == 1e-6 and case in ("separable", "separable, gains in disorder"))
    ],
)
def test_hard_projection(case, sigma_y):
    """As sigma_y falls to 0, u tends to c + A^dagger (y - A c), in float32 without overflow."""
    physics, shape = CASES[case]()
    y, x_sigma, x = (t.float() for t in problem(physics, shape))
    y = physics.A(physics.A_dagger(y))
    sigma, delta = SIGMA.float(), DELTA.float()
    u = joint_prox(physics, y, x_sigma, x, sigma, delta, 1.0, sigma_y)
    weight = (delta / (delta + sigma**2)).view(-1, *(1,) * len(shape))
    c = weight * x_sigma + (1 - weight) * x
    torch.testing.assert_close(u, c + physics.A_dagger(y - physics.A(c)), rtol=0, atol=1e-4)
    torch.testing.assert_close(physics.A(u), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sigma_y", [1e-25, 0.0])
def test_hard_projection_where_nothing_is_measured(sigma_y):
    """A 2x2 mean has no response at the highest frequency, which keeps what c has there."""
    physics = CircularBlur(torch.full((1, 1, 2, 2), 0.25), (1, 8, 8))
    _, _, c = problem(physics, (1, 8, 8))
    checkerboard = (-1.0) ** torch.arange(8).add(torch.arange(8).unsqueeze(1))
    u = joint_prox(physics, physics.A(torch.zeros_like(c)), c, c, 0.3, 0.1, 1.0, sigma_y)
    torch.testing.assert_close((u * checkerboard).sum((-2, -1)), (c * checkerboard).sum((-2, -1)))
    torch.testing.assert_close(physics.A(u), torch.zeros_like(c), rtol=0, atol=1e-6)


@each_operator
def test_hard_projection_stays_finite(case):
    physics, shape = CASES[case]()
    y, x_sigma, x = (t.float() for t in problem(physics, shape))
    for sigma_y in (1e-10, 1e-25, 0.0):
        assert joint_prox(physics, y, x_sigma, x, 0.3, 0.1, 1.0, sigma_y).isfinite().all()


def assert_float32_agrees_with_float64(physics, shape):
    x0, x = (torch.rand(BATCH, *shape, generator=generator(i)) for i in range(2))
    sigma, delta = torch.tensor([0.1, 14.0]), torch.tensor([0.01, 0.09])
    x_sigma = x0 + sigma.view(-1, *(1,) * len(shape)) * torch.randn(x0.shape, generator=generator(2))
    y = observe(physics, x0, 1e-4, generator(3))
    single = joint_prox(physics, y, x_sigma, x, sigma, delta, 1.0, 1e-4)
    double = joint_prox(physics, y.double(), x_sigma.double(), x.double(), sigma, delta, 1.0, 1e-4)
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1.5e-4)


@each_operator
def test_float32_agrees_with_float64_at_low_noise(case):
    assert_float32_agrees_with_float64(*CASES[case]())


@pytest.mark.parametrize("family", [GaussianBlur(), SuperResolution(), Inpainting()])
def test_float32_agrees_with_float64_on_images(family):
    assert_float32_agrees_with_float64(family.draw(BATCH, (3, 64, 64), generator(0)), (3, 64, 64))


@pytest.mark.parametrize("sigma", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("delta", [1e-8, 1e-2, 1e2])
@pytest.mark.parametrize("case", ["blur", "sr 4", "inpainting"])
def test_extreme_levels_keep_values_and_gradients(case, sigma, delta):
    """In float32, against the same in float64."""
    physics, shape = CASES[case]()
    y, noise, x = problem(physics, shape)
    x_sigma = x + sigma * noise
    results = []
    for dtype in (torch.float32, torch.float64):
        parameters = [torch.full((BATCH,), v, dtype=dtype, requires_grad=True) for v in (sigma, delta, 1.0, 0.05)]
        u = joint_prox(physics, y.to(dtype), x_sigma.to(dtype), x.to(dtype), *parameters)
        slopes = torch.autograd.grad(u.square().flatten(1).sum(1).sum(), parameters)
        # derivative with respect to the logarithm: the same scale for all
        results.append((u, *(slope * p for slope, p in zip(slopes, parameters, strict=True))))
    for single, double in zip(*results, strict=True):
        assert single.isfinite().all()
        torch.testing.assert_close(single.double(), double, rtol=2e-3, atol=2e-4 * results[1][0].abs().max().item())
    log_slopes = results[0][1:]
    if 1e-9 < delta / sigma**2 < 1e3:  # beyond, x or x_sigma rightly plays no part
        assert all((slope != 0).all() for slope in log_slopes)


def test_infinite_sigma_drops_its_term():
    physics, shape = CASES["blur"]()
    y, x_sigma, x = problem(physics, shape)
    u = joint_prox(physics, y, x_sigma, x, math.inf, DELTA, LAM, SIGMA_Y)
    gamma = (DELTA / (LAM * SIGMA_Y**2)).view(-1, 1, 1, 1)
    torch.testing.assert_close(u, physics.prox_l2(x, y, gamma))


@each_operator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(case, dtype):
    physics, shape = CASES[case]()
    y, x_sigma, x = (t.to(dtype) for t in problem(physics, shape))
    u = joint_prox(physics, y, x_sigma, x, SIGMA, DELTA, LAM, 1e-4)
    assert u.dtype == dtype
    assert u.isfinite().all()
    expected = joint_prox(physics, y.float(), x_sigma.float(), x.float(), SIGMA, DELTA, LAM, 1e-4)
    error = torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(u.float(), expected, rtol=0, atol=error)
    mixed = joint_prox(physics, y, x_sigma.float(), x, SIGMA, DELTA, LAM, 1e-4)
    assert mixed.dtype == torch.float32


# --- deepinv's own operators ------------------------------------------------------------------------------


def blur_matrix_free() -> LinearPhysics:
    h = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    return LinearPhysics(
        A=lambda x, **_: h[0] * x.roll(1, -1) + h[1] * x + h[2] * x.roll(-1, -2),
        A_adjoint=lambda y, **_: h[0] * y.roll(-1, -1) + h[1] * y + h[2] * y.roll(1, -2),
        max_iter=500,
        tol=1e-12,
    )


DEEPINV = {
    "denoising": lambda: deepinv.physics.Denoising(),
    "blur": lambda: deepinv.physics.BlurFFT((2, 8, 8), GaussianBlur(0.8).kernel),
    "downsampling": lambda: deepinv.physics.Downsampling((2, 8, 8), bicubic_filter(2).double(), 2),
    "inpainting": lambda: deepinv.physics.Inpainting((2, 8, 8), mask=0.4, rng=generator(0)),
    "by conjugate gradients": blur_matrix_free,
}


@pytest.mark.parametrize("name", DEEPINV)
def test_deepinv_operators_are_served_per_sample(name):
    physics, shape = DEEPINV[name](), (2, 8, 8)
    y, x_sigma, x = problem(physics, shape)
    expected = dense_prox(dense(physics.A, shape), y, x_sigma, x, SIGMA, DELTA, LAM, SIGMA_Y)
    u = joint_prox(physics, y, x_sigma, x, SIGMA, DELTA, LAM, SIGMA_Y)
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-4)
    numbers = [0.3, 0.02, 1.5, 0.1]
    same = [torch.full((BATCH,), v, dtype=torch.float64) for v in numbers]
    expected = dense_prox(dense(physics.A, shape), y, x_sigma, x, *same)
    torch.testing.assert_close(joint_prox(physics, y, x_sigma, x, *numbers), expected, rtol=0, atol=1e-4)


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_wrong_number_of_parameters(name):
    physics, shape = CASES["blur"]()
    arguments = dict(zip(PARAMETERS, (SIGMA, DELTA, LAM, SIGMA_Y), strict=True)) | {name: torch.ones(3)}
    with pytest.raises(ValueError, match=r"per sample.*\[2\].*\[3\]"):
        joint_prox(physics, *problem(physics, shape), **arguments)


def test_shapes_that_do_not_match():
    physics, shape = CASES["blur"]()
    y, x_sigma, x = problem(physics, shape)
    for arguments in [(y, x_sigma[:1], x), (y[:1], x_sigma, x)]:
        with pytest.raises(ValueError, match="the same"):
            joint_prox(physics, *arguments, 0.1, 0.1, 1.0, 0.1)
    with pytest.raises(ValueError, match="8x11 pixels"):
        joint_prox(physics, y[..., :-1], x_sigma, x, 0.1, 0.1, 1.0, 0.1)
