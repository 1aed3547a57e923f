"""The proximal step that joins the measurement, the noisy image and the current estimate."""

from collections.abc import Callable

import torch
from torch import Tensor

from ud2m.physics import Observation, at_least_float32, per_sample, prepared_prox
from ud2m.precision import full_precision


def joint_prox(
    observation: Observation,
    x_sigma: Tensor,
    sigma: Tensor | float,
    delta: Tensor | float,
    lam: Tensor | float,
) -> Callable[[Tensor], Tensor]:
    """Return x -> argmin_u |y - A u|^2 / (2 lam sigma_y^2) + |u - x_sigma|^2 / (2 sigma^2) + |u - x|^2 / (2 delta).

    The last two terms merge into |u - c|^2 / (2 v), 1/v = 1/sigma^2 + 1/delta, c = v (x_sigma/sigma^2 +
    x/delta) [UD2M, section 3], so the operator's own prox at c with gamma = v / (lam sigma_y^2) is
    the answer. It is exact for the operators of ``ud2m.physics``, and differentiable in every argument but
    the operator. What does not depend on x is computed once.

    Computed in float32 at least. Any ``DataTerm`` is served as well as its ``prox_l2`` solves
    for gamma shaped [B, 1, 1, 1]; when all four parameters are single numbers gamma has no dimensions.

    Args:
        observation: y [B, ...], its operator, and its noise level sigma_y in image units, > 0. As it falls to 0, which
            ``ud2m.physics`` takes too, u tends to the projection of c on {u: A u = y}.
        x_sigma: noisy image [B, C, H, W].
        sigma: noise level of ``x_sigma`` in image units, > 0; infinity drops the term.
        delta: variance of the current estimate x [B, C, H, W], > 0.
        lam: weight of the measurement noise, > 0.

    sigma_y, sigma, delta and lam are numbers or tensors of one element, or [B] (or [B, 1, 1, 1]).

    Raises:
        ValueError: when shapes do not match.
    """
    if len(observation) != len(x_sigma):
        raise ValueError(f"y and x_sigma must have the same batch size, got {len(observation)} and {len(x_sigma)}")
    y = observation.y
    noisy = x_sigma.to(at_least_float32(x_sigma, y))
    prepared = observation.prox if y.dtype == noisy.dtype else prepared_prox(observation.physics, y.to(noisy.dtype))
    sigma, delta, lam, sigma_y = (per_sample(value, noisy) for value in (sigma, delta, lam, observation.sigma_y))
    # v and c through the ratio of both precisions: nothing overflows in float32, nor is 0 / 0 at sigma = inf
    ratio = delta / sigma**2
    share = ratio / (1 + ratio)
    with full_precision(noisy.device):
        solve = prepared(delta / (1 + ratio) / (lam * sigma_y**2))

    def prox(x: Tensor) -> Tensor:
        if x.shape != noisy.shape:
            raise ValueError(f"x and x_sigma must have the same shape, got {list(x.shape)} and {list(noisy.shape)}")
        with full_precision(x.device):  # it would round products of matrices, as of separable blurs
            u = solve(torch.lerp(x.to(noisy.dtype), noisy, share))
        return u.to(torch.promote_types(x.dtype, x_sigma.dtype))

    return prox
