"""What an observation is asked for."""

from collections.abc import Callable
from functools import singledispatch
from typing import Any, Protocol

from torch import Tensor


class DataTerm(Protocol):
    """What y says of x, in three methods.

    Every ``LinearPhysics`` of deepinv has them: y = A x + sigma_y w. Another kind of observation, as ``JpegCodec``,
    brings its own, and registers with the functions of ``ud2m.physics.measurement`` and with ``select_samples`` where
    their defaults do not fit.
    """

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return the observation [B, ...] of x [B, C, H, W] without noise."""
        ...

    def A_dagger(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return the plainest image [B, C, H, W] that explains y."""
        ...

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float, **kwargs: Any) -> Tensor:
        """Return argmin_u gamma d(u, y) + |u - z|^2 / 2, d = |A u - y|^2 / 2 if A is linear.

        ``gamma`` is a number or tensor of one element, [B] or [B, 1, 1, 1]. Differentiable in z and gamma.
        """
        ...


Prox = Callable[[Tensor | float], Callable[[Tensor], Tensor]]
"""gamma -> (z -> argmin_u gamma d(u, y) + |u - z|^2 / 2)."""


@singledispatch
def prepared_prox(physics: DataTerm, y: Tensor) -> Prox:
    """Return the operator's ``prox_l2`` for one y [B, ...] and many gamma and z, in the dtype of y.

    By default nothing is prepared; operators register for which a part depends on y or gamma alone, which is then
    computed once.
    """
    return lambda gamma: lambda z: physics.prox_l2(z, y, gamma)
