"""The proximal step by conjugate gradients, for operators without a closed form."""

import warnings
from typing import Any

import torch
from deepinv.optim.linear import conjugate_gradient, least_squares_implicit_backward
from torch import Tensor

from ud2m.physics.rows import at_least_float32, per_sample

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-13}
"""Relative residual of the normal equations at which the iteration stops."""


class ConvergenceWarning(UserWarning):
    """An iteration stopped at its limit before it reached its tolerance."""


class ConjugateGradients:
    """Mixin of a deepinv ``LinearPhysics``: ``prox_l2`` and ``A_dagger`` by conjugate gradients on its A and A^T.

    The prox is u = z + d with (A^T A + I / gamma) d = A^T (y - A z), solved from d = 0. In this form nothing large is
    subtracted, and gamma = inf is allowed (d is then the shortest correction that explains y). The iteration stops when
    its residual is below ``TOLERANCES`` times the right side for every sample: 1e-5 in float32,
    1e-13 in float64. About 4 sqrt(gamma) steps are needed, e.g. 160 for gamma = 1600 (sigma_y = 0.01, delta = 0.16).

    The gradient is that of the solution, by implicit differentiation (one more solve): it costs no memory
    per iteration. Solver and gradient are deepinv's.
    """

    max_iterations: int = 1000

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float, **kwargs: Any) -> Tensor:
        """Return argmin_u gamma |A u - y|^2 / 2 + |u - z|^2 / 2.

        Args:
            z: [B, C, H, W].
            y: [B, ...].
            gamma: number or tensor of one element, or [B] or [B, 1, 1, 1]; receives a gradient.
            kwargs: parameters of the operator, as deepinv's ``update_parameters`` takes them.

        Warns:
            ConvergenceWarning: when the tolerance was not reached.
        """
        mean = z.to(at_least_float32(z, y))
        weight = per_sample(gamma, mean).reshape(-1).expand(len(mean))
        mismatch = y.to(mean.dtype) - self.A(mean, **kwargs)  # type: ignore[attr-defined]
        zero = torch.zeros_like(mean)
        d = least_squares_implicit_backward(self, mismatch, z=zero, gamma=weight, **self._options(mean.dtype))
        self._check(d, self.A_adjoint(mismatch), 1 / per_sample(weight, mean))  # type: ignore[attr-defined]
        return (mean + d).to(z.dtype)

    def A_dagger(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return the shortest x among those with the smallest |A x - y|: conjugate gradients on A^T A x = A^T y from 0.

        Unlike deepinv's ``least_squares``, which leaves out the last A^T when x and y have the same shape.

        Warns:
            ConvergenceWarning: when the tolerance was not reached.
        """
        right = self.A_adjoint(y.to(at_least_float32(y)), **kwargs)  # type: ignore[attr-defined]
        x = conjugate_gradient(self._normal, right, **self._options(right.dtype))
        self._check(x, right, 0.0)
        return x.to(y.dtype)

    def _normal(self, x: Tensor) -> Tensor:
        return self.A_adjoint(self.A(x))  # type: ignore[attr-defined]

    def _options(self, dtype: torch.dtype) -> dict[str, Any]:
        # deepinv's eps of 1e-8 is added to squared norms, and stalls on small right sides
        return {"tol": TOLERANCES[dtype], "max_iter": self.max_iterations, "eps": torch.finfo(dtype).tiny}

    @torch.no_grad()
    def _check(self, x: Tensor, right: Tensor, ridge: Tensor | float) -> None:
        error, size = (v.flatten(1).norm(dim=1) for v in (self._normal(x) + ridge * x - right, right))
        worst = (error / size.clamp_min(torch.finfo(size.dtype).tiny)).max().item()
        if worst > 100 * TOLERANCES[size.dtype]:  # the iteration's own residual drifts from the true one by rounding
            warnings.warn(
                f"conjugate gradients of {type(self).__name__} stopped with a relative residual of {worst:.1g} (wanted "
                f"{TOLERANCES[size.dtype]:g}, at most {self.max_iterations} steps); a larger sigma_y converges faster",
                ConvergenceWarning,
                stacklevel=3,
            )
