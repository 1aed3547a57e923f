"""The joint prox by a dense solve, and problems for it."""

import torch
from deepinv.physics import LinearPhysics
from operators import BATCH, generator
from torch import Tensor

from ud2m.physics import Observation, observe
from ud2m.unfolded import prox as unfolded

SIGMA, DELTA = torch.tensor([0.4, 0.05]).double(), torch.tensor([0.003, 0.2]).double()


LAM, SIGMA_Y = torch.tensor([0.7, 2.5]).double(), torch.tensor([0.01, 0.2]).double()


def problem(physics: LinearPhysics, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, x_sigma, x) [B, ...] in float64."""
    x0, x_sigma, x = (torch.rand(BATCH, *shape, generator=generator(i), dtype=torch.float64) for i in range(3))
    return observe(physics, x0, SIGMA_Y, generator(9)), x_sigma, x


def joint_prox(physics, y, x_sigma, x, sigma, delta, lam, sigma_y) -> Tensor:
    """Return u of ``ud2m.unfolded.prox.joint_prox``, everything prepared anew."""
    return unfolded.joint_prox(Observation(y, physics, sigma_y), x_sigma, sigma, delta, lam)(x)


def dense_prox(A: Tensor, y: Tensor, x_sigma: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
    """Solve the normal equations (A^T A / (lam sigma_y^2) + I / sigma^2 + I / delta) u = right side, per sample."""
    sigma, delta, lam, sigma_y = (p.view(-1, 1) for p in parameters)
    eye = torch.eye(A.shape[-1], dtype=A.dtype)
    matrix = A.mT @ A / (lam * sigma_y**2)[..., None] + (1 / sigma**2 + 1 / delta)[..., None] * eye
    data = (A.mT @ y.flatten(1).unsqueeze(-1)).squeeze(-1) / (lam * sigma_y**2)
    right = data + x_sigma.flatten(1) / sigma**2 + x.flatten(1) / delta
    return torch.linalg.solve(matrix, right).view_as(x)
