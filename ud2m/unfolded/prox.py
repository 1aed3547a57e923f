"""The proximal step that joins the measurement, the noisy image and the current estimate."""

import torch
from torch import Tensor

from ud2m.physics import DataTerm, at_least_float32, per_sample
from ud2m.precision import full_precision


def joint_prox(
    physics: DataTerm,
    y: Tensor,
    x_sigma: Tensor,
    x: Tensor,
    sigma: Tensor | float,
    delta: Tensor | float,
    lam: Tensor | float,
    sigma_y: Tensor | float,
) -> Tensor:
    """Solve argmin_u |y - A u|^2 / (2 lam sigma_y^2) + |u - x_sigma|^2 / (2 sigma^2) + |u - x|^2 / (2 delta).

    The last two terms merge into |u - c|^2 / (2 v), 1/v = 1/sigma^2 + 1/delta, c = v (x_sigma/sigma^2 +
    x/delta) [UD2M, section 3], so the operator's own ``prox_l2`` at c with gamma = v / (lam sigma_y^2) is
    the answer. It is exact for the operators of ``ud2m.physics``, and differentiable in every argument but
    the operator.

    Computed in float32 at least. Any deepinv ``DataTerm`` is served as well as its ``prox_l2`` solves
    for gamma shaped [B, 1, 1, 1]; when all four parameters are single numbers gamma has no dimensions.

    Args:
        physics: the operator of this batch.
        y: measurements [B, ...].
        x_sigma: noisy image [B, C, H, W].
        x: current estimate [B, C, H, W].
        sigma: noise level of ``x_sigma`` in image units, > 0; infinity drops the term.
        delta: variance of ``x``, > 0.
        lam: weight of the measurement noise, > 0.
        sigma_y: noise level of ``y`` in image units, > 0. As it falls to 0, which ``ud2m.physics`` takes too,
            u tends to the projection of c on {u: A u = y}.

    Each of the last four is a number or tensor of one element, or [B] (or [B, 1, 1, 1]).

    Raises:
        ValueError: when shapes do not match.
    """
    if x.shape != x_sigma.shape or len(y) != len(x):
        raise ValueError(
            "x and x_sigma must have the same shape and y the same batch size, got "
            f"x {list(x.shape)}, x_sigma {list(x_sigma.shape)}, y {list(y.shape)}"
        )
    dtype = at_least_float32(x, x_sigma, y)
    mean, noisy = x.to(dtype), x_sigma.to(dtype)
    sigma, delta, lam, sigma_y = (per_sample(value, mean) for value in (sigma, delta, lam, sigma_y))
    # v and c through the ratio of both precisions: nothing overflows in float32, nor is 0 / 0 at sigma = inf
    ratio = delta / sigma**2
    c = torch.lerp(mean, noisy, ratio / (1 + ratio))
    v = delta / (1 + ratio)
    with full_precision(x.device):  # it would round products of matrices, as of separable blurs
        u = physics.prox_l2(c, y.to(dtype), v / (lam * sigma_y**2))
    return u.to(torch.promote_types(x.dtype, x_sigma.dtype))
