"""Total variation of videos in space and time, beside the data and an estimate."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ud2m.physics import Observation, per_sample
from ud2m.unfolded.prox import joint_prox

ITERATIONS = 100


def differences(x: Tensor, space: float, time: float) -> Tensor:
    """Return K x [3, B, C, T, H, W]: forward differences of rows and columns times ``space``, of frames times ``time``.

    Beyond the last pixel and frame the clip goes on as it ends: the difference is 0.
    """
    out = x.new_zeros(3, *x.shape)
    for k, weight in enumerate((time, space, space)):
        count = x.shape[k + 2] - 1
        out[k].narrow(k + 2, 0, count).copy_(weight * x.diff(dim=k + 2))
    return out


def differences_adjoint(p: Tensor, space: float, time: float) -> Tensor:
    """Return K^T p [B, C, T, H, W] of p [3, B, C, T, H, W]."""
    x = torch.zeros_like(p[0])
    for k, weight in enumerate((time, space, space)):
        count = x.shape[k + 2] - 1
        part = weight * p[k].narrow(k + 2, 0, count)
        x.narrow(k + 2, 0, count).sub_(part)
        x.narrow(k + 2, 1, count).add_(part)
    return x


def total_variation(x: Tensor, space: float, time: float) -> Tensor:
    """Return TV(x) [B] = sum over pixels of sqrt(space^2 (dh^2 + dv^2) + time^2 dt^2), of x [B, C, T, H, W]."""
    return differences(x, space, time).norm(dim=0).flatten(1).sum(1)


def tv_prox(
    observation: Observation,
    u: Tensor,
    delta: Tensor | float,
    space: float = 0.0,
    time: float = 0.0,
    iterations: int = ITERATIONS,
) -> Tensor:
    """Return argmin_x |y - A x|^2 / (2 sigma_y^2) + |x - u|^2 / (2 delta) + TV(x), TV as in ``total_variation``.

    TV(x) = max <p, K x> over |p| <= 1 at every pixel, and for a fixed p the best x is exact: the operator's prox at
    u - delta K^T p. So accelerated projected ascent on p (Beck and Teboulle, 2009), each clip restarted where it turns
    back (O'Donoghue and Candes, 2015), alternates an exact step in x with one in p. The primal-dual steps of Chambolle
    and Pock (2011, algorithm 2) need a prox of another weight each time and came less near in as many.

    Args:
        observation: of videos [B, C, T, H, W].
        u: estimates [B, C, T, H, W].
        delta: their variance > 0, a number or [B].
        space: weight of the differences between pixels, per image unit, >= 0.
        time: weight of the differences between frames. Where both are 0 the result is that of ``joint_prox``.
        iterations: evaluations of the prox.
    """
    back_to_data = joint_prox(observation, u, math.inf, delta, 1.0)
    return back_to_data(u) if space == time == 0 else primal_dual(back_to_data, u, delta, space, time, iterations)[0]


def primal_dual(
    back_to_data: Callable[[Tensor], Tensor],
    u: Tensor,
    delta: Tensor | float,
    space: float,
    time: float,
    iterations: int,
    p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return x and p of ``tv_prox``, p [3, B, C, T, H, W] with |p| <= 1 and x the best one for it.

    So their duality gap is TV(x) - <K x, p>, and |x - x*|^2 <= 2 delta gap.

    Args:
        back_to_data: the prox of the data with weight delta; the identity where there is none.
        u: as for ``tv_prox``.
        delta: as for ``tv_prox``.
        space: as for ``tv_prox``.
        time: as for ``tv_prox``, not 0 together.
        iterations: as for ``tv_prox``.
        p: where it begins, as that of a similar u; None: at 0.
    """
    delta = per_sample(delta, u)
    p = q = torch.zeros_like(differences(u, space, time)) if p is None else p
    step = 1 / (delta * (8 * space**2 + 4 * time**2))  # |K|^2 <= 8 space^2 + 4 time^2
    count = u.new_zeros(len(u))
    for _ in range(iterations):
        x = back_to_data(u - delta * differences_adjoint(q, space, time))
        last, p = p, q + step * differences(x, space, time)
        p = p / p.norm(dim=0).clamp_min(1.0)
        turned = ((q - p) * (p - last)).transpose(0, 1).flatten(1).sum(1) > 0
        count = torch.where(turned, 0.0, count) + 1
        q = p + per_sample((count - 1) / (count + 2), u) * (p - last)
    return back_to_data(u - delta * differences_adjoint(p, space, time)), p
