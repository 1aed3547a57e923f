"""Total variation beside the data: against duality, and in one dimension against a quadratic program."""

import pytest
import torch
from operators import dense, generator
from scipy.optimize import lsq_linear

from ud2m.physics import Denoising, Observation, SpaceTime, SuperResolution, VideoOperator, observe
from ud2m.unfolded.prox import joint_prox
from ud2m.unfolded.total_variation import differences, differences_adjoint, primal_dual, total_variation, tv_prox

SHAPE = (1, 5, 4, 6)
"""C, T, H, W."""


def problem(sigma_y: float):
    physics = VideoOperator(SuperResolution(2, "box"), 2, 2).draw(2, SHAPE)
    x0, u = (torch.rand(2, *SHAPE, generator=generator(k), dtype=torch.float64) for k in range(2))
    y = observe(physics, x0, sigma_y, generator(3))
    return Observation(y, physics, torch.full((2,), sigma_y, dtype=torch.float64)), u


def columns(space: float, time: float) -> torch.Tensor:
    """Return K as a matrix [3, n, n], written out pixel by pixel."""
    channels, frames, height, width = SHAPE
    number = torch.arange(channels * frames * height * width).view(SHAPE)
    K = torch.zeros(3, number.numel(), number.numel(), dtype=torch.float64)
    for c, t, i, j in torch.cartesian_prod(*map(torch.arange, SHAPE)).tolist():
        row, after = number[c, t, i, j], ((t + 1, i, j), (t, i + 1, j), (t, i, j + 1))
        for k, (place, weight) in enumerate(zip(after, (time, space, space), strict=True)):
            if all(a < n for a, n in zip(place, SHAPE[1:], strict=True)):
                K[k, row, row], K[k, row, number[c, *place]] = -weight, weight
    return K


def test_differences_are_the_matrix_and_its_transpose():
    K, x = columns(0.7, 2.0), torch.rand(2, *SHAPE, generator=generator(), dtype=torch.float64)
    p = torch.randn(3, 2, *SHAPE, generator=generator(1), dtype=torch.float64)
    torch.testing.assert_close(differences(x, 0.7, 2.0).flatten(2), torch.einsum("kmn,bn->kbm", K, x.flatten(1)))
    expected = torch.einsum("kmn,kbm->bn", K, p.flatten(2))
    torch.testing.assert_close(differences_adjoint(p, 0.7, 2.0).flatten(1), expected)
    lengths = torch.einsum("kmn,bn->kbm", K, x.flatten(1)).square().sum(0).sqrt().sum(1)
    torch.testing.assert_close(total_variation(x, 0.7, 2.0), lengths)


@pytest.mark.parametrize(("space", "time"), [pytest.param(3.0, 0.0, marks=pytest.mark.slow), (0.0, 8.0), (2.0, 5.0)])
@pytest.mark.parametrize("sigma_y", [0.3, pytest.param(0.001, marks=pytest.mark.slow)])
def test_the_duality_gap_closes(space, time, sigma_y):
    """With H = A^T A / sigma_y^2 + I / delta both functions by dense algebra, at |p| <= 1."""
    observation, u = problem(sigma_y)
    delta = torch.tensor([0.02, 0.3], dtype=torch.float64)
    K, A = columns(space, time), dense(observation.physics.A, SHAPE)
    for iterations, gap in ((30, 0.5), (400, 5e-4)):
        x, p = primal_dual(joint_prox(observation, u, torch.inf, delta, 1.0), u, delta, space, time, iterations)
        assert p.norm(dim=0).max() <= 1 + 1e-12
        told = total_variation(x, space, time) - (differences(x, space, time) * p).sum(0).flatten(1).sum(1)
        for b in range(2):
            y, given, found = (v[b].flatten() for v in (observation.y, u, x))
            H = A[b].T @ A[b] / sigma_y**2 + torch.eye(len(found)) / delta[b]
            r = A[b].T @ y / sigma_y**2 + given / delta[b]
            constant = y @ y / (2 * sigma_y**2) + given @ given / (2 * delta[b])
            primal = found @ H @ found / 2 - r @ found + constant + (K @ found).norm(dim=0).sum()
            slope = torch.einsum("kmn,km->n", K, p[:, b].flatten(1))
            best = torch.linalg.solve(H, r - slope)
            dual = best @ H @ best / 2 - r @ best + constant + best @ slope
            assert slope.abs().max() > 0.1  # the term is felt
            assert -1e-8 * primal < primal - dual < gap * primal
            torch.testing.assert_close(primal - dual, told[b], rtol=1e-5, atol=1e-6 * primal.item())


@pytest.mark.parametrize("weight", [0.5, 3.0, 30.0])
def test_in_one_dimension_it_is_the_solution_of_a_quadratic_program(weight):
    """Frames of one pixel: with x = H^-1 (r - D^T p) the dual is least squares within |p| <= weight, by scipy."""
    frames, sigma_y, delta = 12, 0.1, 0.05
    matrix = torch.zeros(4, frames, dtype=torch.float64)
    for j in range(4):
        matrix[j, 3 * j : 3 * j + 3] = 1 / 3
    physics = SpaceTime(matrix, Denoising().draw(1, (1, 1, 1)), (1, frames, 1, 1))
    y = torch.rand(1, 1, 4, 1, 1, generator=generator(), dtype=torch.float64)
    u = torch.rand(1, 1, frames, 1, 1, generator=generator(1), dtype=torch.float64)
    observation = Observation(y, physics, torch.full((1,), sigma_y, dtype=torch.float64))
    H = matrix.T @ matrix / sigma_y**2 + torch.eye(frames) / delta
    r = matrix.T @ y.flatten() / sigma_y**2 + u.flatten() / delta
    D, root = torch.eye(frames, dtype=torch.float64).diff(dim=0), torch.linalg.cholesky(H)
    inner = [torch.linalg.solve_triangular(root, v, upper=False) for v in (D.T, r.unsqueeze(1))]
    p = lsq_linear(inner[0].numpy(), inner[1][:, 0].numpy(), (-weight, weight), tol=1e-14).x
    expected = torch.linalg.solve(H, r - D.T @ torch.from_numpy(p))
    found = tv_prox(observation, u, delta, time=weight, iterations=300)
    torch.testing.assert_close(found.flatten(), expected, rtol=0, atol=1e-8)
    default = tv_prox(observation, u, delta, time=weight)
    torch.testing.assert_close(default.flatten(), expected, rtol=0, atol=1e-3)


def test_without_weights_it_is_the_prox_and_rows_are_solved_alone():
    observation, u = problem(0.05)
    delta = torch.tensor([0.02, 0.3], dtype=torch.float64)
    without = joint_prox(observation, u, torch.inf, delta, 1.0)(u)
    assert torch.equal(tv_prox(observation, u, delta), without)
    together = tv_prox(observation, u, delta, 1.0, 2.0)
    for b in range(2):
        row = torch.tensor([b])
        alone = tv_prox(observation.rows(row), u[row], delta[row], 1.0, 2.0)
        torch.testing.assert_close(alone, together[row])
    assert (together - without).abs().max() > 0.01
