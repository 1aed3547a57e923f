"""Operators that act on rows and columns, solved exactly by singular values."""

from typing import Any

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from ud2m.physics.immutable import Immutable
from ud2m.physics.rows import at_least_float32, per_sample


class Separable(Immutable, LinearPhysics):
    """A X = U (W o (V^T X V)) U^T for each channel, with the same U and V for rows and columns of square images.

    With M = U S V^T and W = s s^T this is M X M^T; other gains W can be given.

    Args:
        matrix: M, [m, n], m <= n.
        image_shape: (C, n, n).
        threshold: singular values of M below it become 0.
        gains: a function of s s^T [m, m] that returns W, [C, m, m]; default: the same for all channels.
        device: where the operator lives.

    Raises:
        ValueError: when the image is not n x n.
    """

    rows: Tensor
    columns: Tensor
    weights: Tensor

    def __init__(
        self,
        matrix: Tensor,
        image_shape: tuple[int, int, int],
        threshold: float = 0.0,
        gains: Any = None,
        device: torch.device | str = "cpu",
    ):
        if image_shape[1:] != (matrix.shape[1],) * 2:
            raise ValueError(f"this operator is for images of {matrix.shape[1]}x{matrix.shape[1]}, got {image_shape}")
        super().__init__(img_size=tuple(image_shape))
        self.img_size = tuple(image_shape)
        u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        s = torch.where(s < threshold, 0.0, s)
        product = torch.outer(s, s)
        for name, value in {
            "rows": u,
            "columns": vt.T,
            "weights": product.unsqueeze(0) if gains is None else gains(product),
        }.items():
            self.register_buffer(name, value)
        self.to(device)

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return A x: [B, C, n, n] -> [B, C, m, m]."""
        self.update_parameters(**kwargs)
        dtype = at_least_float32(x)
        return self._to(self.rows, self.weights.to(dtype) * self._from(self.columns, x.to(dtype))).to(x.dtype)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return A^T y: [B, C, m, m] -> [B, C, n, n]."""
        self.update_parameters(**kwargs)
        dtype = at_least_float32(y)
        return self._to(self.columns, self.weights.to(dtype) * self._from(self.rows, y.to(dtype))).to(y.dtype)

    def A_dagger(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return A^dagger y; gains that are 0 stay 0."""
        self.update_parameters(**kwargs)
        dtype = at_least_float32(y)
        inverse = torch.where(self.weights > 0, 1 / self.weights, 0.0).to(dtype)
        return self._to(self.columns, inverse * self._from(self.rows, y.to(dtype))).to(y.dtype)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float, **kwargs: Any) -> Tensor:
        """Return argmin_u gamma |A u - y|^2 / 2 + |u - z|^2 / 2 = z + V (G o (U^T y U - W o (V^T z V))) V^T.

        G = W / (W^2 + 1 / gamma), entry by entry.

        ``gamma``: number, or tensor of one element, [B] or [B, 1, 1, 1]; infinity is allowed.
        """
        self.update_parameters(**kwargs)
        mean = z.to(at_least_float32(z, y))
        weights = self.weights.to(mean.dtype)
        mismatch = self._from(self.rows, y.to(mean.dtype)) - weights * self._from(self.columns, mean)
        ridge = 1 / per_sample(gamma, mean)
        gain = weights / (weights**2 + ridge).clamp_min(torch.finfo(mean.dtype).tiny)
        return (mean + self._to(self.columns, gain * mismatch)).to(z.dtype)

    @staticmethod
    def _from(basis: Tensor, image: Tensor) -> Tensor:
        if image.shape[-2:] != (len(basis),) * 2:
            raise ValueError(f"this operator needs {len(basis)}x{len(basis)} pixels here, got {list(image.shape)}")
        matrix = basis.to(image.dtype)
        return matrix.T @ image @ matrix

    @staticmethod
    def _to(basis: Tensor, coefficients: Tensor) -> Tensor:
        matrix = basis.to(coefficients.dtype)
        return matrix @ coefficients @ matrix.T
