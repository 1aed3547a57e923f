"""The proximal step and the pseudo-inverse by conjugate gradients, for operators without a closed form."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ud2m.physics.rows import at_least_float32, per_sample

TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-13}
"""Relative residual of the normal equations at which a sample's iteration stops."""
DRIFT = 100
"""Rounding lets the true residual drift from the iteration's own; above this many tolerances it is told."""
PINV_ITERATIONS = 1000
"""Largest number of steps of a pseudo-inverse, where only the number of steps keeps noise from growing."""

Linear = Callable[[Tensor], Tensor]


class ConvergenceWarning(UserWarning):
    """An iteration stopped at its limit before it reached its tolerance."""


class ConjugateGradients:
    """Mixin of a deepinv ``LinearPhysics``: ``prox_l2`` and ``A_dagger`` by conjugate gradients on its A and A^T.

    The prox is u = z + d with d = argmin |A d - r|^2 + |d|^2 / gamma and r = y - A z. In this form nothing large is
    subtracted, and gamma = inf is allowed: d is then A^dagger r, the shortest among the best. See
    ``damped_least_squares`` for the iteration. At most about 4 sqrt(gamma) steps are needed, e.g. 160 for gamma = 1600
    (sigma_y = 0.01, delta = 0.16); ``max_iterations`` bounds them, and suffices for gamma = 1e6.

    The gradient is that of the solution, by implicit differentiation: one more solve, and no memory per iteration.
    """

    max_iterations: int = 4000

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float, **kwargs: Any) -> Tensor:
        """Return argmin_u gamma |A u - y|^2 / 2 + |u - z|^2 / 2.

        Args:
            z: [B, C, H, W].
            y: [B, ...].
            gamma: number or tensor of one element, or [B] or [B, 1, 1, 1], >= 0; receives a gradient where positive.
            kwargs: parameters of the operator, as deepinv's ``update_parameters`` takes them.

        Raises:
            FloatingPointError: when z or y is not finite, or gamma is no weight.

        Warns:
            ConvergenceWarning: when the tolerance was not reached.
        """
        mean = z.to(at_least_float32(z, y))
        weight = per_sample(gamma, mean).reshape(-1).expand(len(mean))
        self._refuse(weight.isnan() | (weight < 0), "a gamma that is NaN or negative")
        self._refuse_not_finite(z=z, y=y)
        mismatch = y.to(mean.dtype) - self.A(mean, **kwargs)  # type: ignore[attr-defined]
        return (mean + _LeastSquares.apply(mismatch, weight, self, self.max_iterations)).to(z.dtype)

    def A_dagger(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return the shortest x among those with the smallest |A x - y|, whatever the rank of A.

        Components that A hardly passes on come last; those that ``PINV_ITERATIONS`` steps do not reach stay out.
        deepinv's ``least_squares`` leaves out the last A^T when x and y have the same shape.

        Raises:
            FloatingPointError: when y is not finite.

        Warns:
            ConvergenceWarning: when the tolerance was not reached; x has then the smallest residual that was met.
        """
        self.update_parameters(**kwargs)  # type: ignore[attr-defined]
        self._refuse_not_finite(y=y)
        right, steps = y.to(at_least_float32(y)), min(self.max_iterations, PINV_ITERATIONS)
        return _LeastSquares.apply(right, right.new_full((len(y),), torch.inf), self, steps).to(y.dtype)

    def _refuse_not_finite(self, **arguments: Tensor) -> None:
        for name, value in arguments.items():
            self._refuse(~value.detach().isfinite().flatten(1).all(1), f"NaN or infinity in {name}")

    def _refuse(self, wrong: Tensor, what: str) -> None:
        if wrong.any():
            samples = ", ".join(map(str, torch.nonzero(wrong)[:, 0].tolist()))
            raise FloatingPointError(
                f"conjugate gradients of {type(self).__name__} got {what} (sample {samples} of {len(wrong)})"
            )

    def _warn(self, residual: Tensor, late: Tensor, steps: int) -> None:
        if late.any():
            warnings.warn(
                f"conjugate gradients of {type(self).__name__} stopped with a relative residual of "
                f"{residual[late].max().item():.1g} in {int(late.sum())} of {len(late)} samples "
                f"(wanted {TOLERANCES[residual.dtype]:g}, at most {steps} steps); a prox converges faster with a "
                "larger sigma_y",
                ConvergenceWarning,
                stacklevel=5,
            )


class _LeastSquares(torch.autograd.Function):
    """d = (A^T A + I / gamma)^-1 A^T r, differentiable in r and gamma.

    The derivative is the same problem with A^T in the place of A: a gradient v of d becomes
    w = (A A^T + I / gamma)^-1 A v for r, and <v - A^T w, d> / gamma for gamma, neither of which grows with gamma.
    """

    @staticmethod
    def forward(ctx: Any, r: Tensor, gamma: Tensor, physics: Any, steps: int) -> Tensor:
        """Return d [B, C, H, W] for r [B, ...] and gamma [B]."""
        d, residual, late = damped_least_squares(physics.A, physics.A_adjoint, r, gamma, steps)
        physics._warn(residual, late, steps)
        ctx.physics, ctx.steps = physics, steps
        ctx.save_for_backward(d, gamma)
        return d

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients for r and gamma."""
        physics, (v,), (d, gamma) = ctx.physics, gradients, ctx.saved_tensors
        w, residual, late = damped_least_squares(physics.A_adjoint, physics.A, v, gamma, ctx.steps)
        # where losses are scaled, gradients may overflow: then w is NaN, which whoever scales them looks for
        physics._warn(residual, late & v.isfinite().flatten(1).all(1), ctx.steps)
        slope = ((v - physics.A_adjoint(w)) * d).flatten(1).sum(1) / gamma if ctx.needs_input_grad[1] else None
        return w, slope, None, None


def damped_least_squares(
    A: Linear, A_adjoint: Linear, right: Tensor, gamma: Tensor, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x = argmin |A x - right|^2 + |x|^2 / gamma, its relative residual [B], and whether that is too large [B].

    Conjugate gradients on (A^T A + I / gamma) x = A^T right (Hestenes and Stiefel, 1952). The curvature
    p^T (A^T A + I / gamma) p is the sum of two squares, which rounding cannot make negative, so that operators without
    full rank do no harm. Residuals follow from their predecessors: what A^T does not see of the data is rounded once,
    at the start, and not in every step. x is the iterate of the smallest residual.

    Each sample is solved for itself: it stands still as soon as its residual is below ``TOLERANCES`` times that of
    x = 0 (1e-6 in float32, 1e-13 in float64), whatever the others need. deepinv's ``conjugate_gradient`` steps on with
    all until the last has converged, dividing rounding errors by each other, and every 100 steps computes residuals
    anew but not the directions that must be conjugate to them: samples that had converged then explode.

    Args:
        A: [B, ...] -> [B, ...], each sample for itself.
        A_adjoint: its adjoint.
        right: [B, ...].
        gamma: weights [B] in [0, inf]; x is 0 for 0, and A^dagger right for infinity.
        max_iterations: largest number of steps.
    """
    # Both terms times gamma / (1 + gamma): finite at gamma = 0 and infinity. Data near 1: squares do not underflow.
    fit, damping = 1 / (1 + 1 / gamma), 1 / (1 + gamma)
    size = right.flatten(1).abs().amax(1)
    size = torch.where(size == 0, 1, size)

    def slope(data: Tensor, x: Tensor | float) -> Tensor:
        raised = A_adjoint(data)
        return per_sample(fit, raised) * raised - per_sample(damping, raised) * x

    target = right / per_sample(size, right)
    p = rest = slope(target, 0.0)
    x = best = torch.zeros_like(p)
    power = least = first = _square(p)
    limit = TOLERANCES[right.dtype] ** 2 * first
    active = power > limit
    for _ in range(max_iterations):
        if not active.any():
            break
        q = A(p)
        curvature = fit * _square(q) + damping * _square(p)
        active = active & (curvature > 0)  # no NaN passes here
        step = per_sample(torch.where(active, power / curvature, 0), p)
        x, rest = x + step * p, rest + step * slope(-q, p)  # slope: -(A^T A + I / gamma) p
        before, power = power, _square(rest)
        better = active & (power < least)
        best, least = torch.where(_rows(better, x), x, best), torch.where(better, power, least)
        active = active & (power > limit)
        p = rest + per_sample(torch.where(active, power / before, 0), p) * p
    true = _square(slope(target - A(best), best))
    residual = torch.where(first == 0, 0, true / first).sqrt()
    # A pseudo-inverse may end at its last step, a damped solution not. Written so that NaN is too large.
    late = ~(residual <= DRIFT * TOLERANCES[right.dtype]) | (active & gamma.isfinite())
    return per_sample(size, best) * best, residual, late


def _square(image: Tensor) -> Tensor:
    return image.flatten(1).square().sum(1)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.ndim - 1))
