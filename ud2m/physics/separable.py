"""Operators that act on rows and columns, solved exactly by singular values."""

from collections.abc import Callable
from typing import Any

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from ud2m.physics.circular import RELATIVE_RANK_TOLERANCE
from ud2m.physics.immutable import Immutable
from ud2m.physics.rows import at_least_float32, per_sample


class Separable(Immutable, LinearPhysics):
    """A X = M X N^T for each channel: M acts on the columns of an image, N on its rows.

    With the singular value decompositions M = U S V^T and N = P T Q^T this is U (W o (V^T X Q)) P^T, W = s t^T. Other
    gains W can be given.

    Args:
        matrix: M, [h, H], h <= H.
        image_shape: (C, H, W).
        threshold: singular values of M and N below it become 0.
        gains: a function of s t^T [h, w] that returns W, [C, h, w]; default: the same for all channels.
        device: where the operator lives.
        across: N, [w, W], w <= W; default: M.

    Raises:
        ValueError: when the matrices do not suit the image.
    """

    u: Tensor
    v: Tensor
    p: Tensor
    q: Tensor
    weights: Tensor

    def __init__(
        self,
        matrix: Tensor,
        image_shape: tuple[int, int, int],
        threshold: float = 0.0,
        gains: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str = "cpu",
        across: Tensor | None = None,
    ):
        across = matrix if across is None else across
        size = (matrix.shape[1], across.shape[1])
        if image_shape[1:] != size:
            raise ValueError(f"this operator is for images of {size[0]}x{size[1]}, got {image_shape}")
        super().__init__(img_size=tuple(image_shape))
        self.img_size = tuple(image_shape)
        u, s, v = _decomposed(matrix, threshold)
        p, t, q = (u, s, v) if across is matrix else _decomposed(across, threshold)
        product = torch.outer(s, t)
        weights = product.unsqueeze(0) if gains is None else gains(product)
        for name, value in {"u": u, "v": v, "p": p, "q": q, "weights": weights}.items():
            self.register_buffer(name, value)
        self.to(device)

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return A x: [B, C, H, W] -> [B, C, h, w]."""
        self.update_parameters(**kwargs)
        dtype = at_least_float32(x)
        return self._image(self.weights.to(dtype) * self._seen(x.to(dtype))).to(x.dtype)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return A^T y: [B, C, h, w] -> [B, C, H, W]."""
        self.update_parameters(**kwargs)
        dtype = at_least_float32(y)
        return self._scene(self.weights.to(dtype) * self._measured(y.to(dtype))).to(y.dtype)

    def A_dagger(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return A^dagger y; gains below 1e-5 of the largest count as 0."""
        self.update_parameters(**kwargs)
        data = y.to(at_least_float32(y))
        return self._scene(self._gain(data.new_zeros(())) * self._measured(data)).to(y.dtype)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float, **kwargs: Any) -> Tensor:
        """Return argmin_u gamma |A u - y|^2 / 2 + |u - z|^2 / 2 = z + V (G o (U^T y P - W o (V^T z Q))) Q^T.

        G = W / (W^2 + 1 / gamma), entry by entry.

        ``gamma``: number, or tensor of one element, [B] or [B, 1, 1, 1]; at infinity G is that of ``A_dagger``.
        """
        self.update_parameters(**kwargs)
        mean = z.to(at_least_float32(z, y))
        mismatch = self._measured(y.to(mean.dtype)) - self.weights.to(mean.dtype) * self._seen(mean)
        return (mean + self._scene(self._gain(1 / per_sample(gamma, mean)) * mismatch)).to(z.dtype)

    def _gain(self, ridge: Tensor) -> Tensor:
        """Return W / (W^2 + ridge), and 0 for the W that count as 0 where the ridge is 0."""
        weights = self.weights.to(ridge.dtype)
        kept = weights > RELATIVE_RANK_TOLERANCE * weights.amax((-2, -1), keepdim=True)
        gain = weights / (weights**2 + ridge).clamp_min(torch.finfo(ridge.dtype).tiny)
        return torch.where(kept | (ridge > 0), gain, 0.0)

    def _seen(self, x: Tensor) -> Tensor:
        """Return V^T x Q."""
        return _product(self.v.T, x, self.q)

    def _scene(self, coefficients: Tensor) -> Tensor:
        """Return V c Q^T."""
        return _product(self.v, coefficients, self.q.T)

    def _measured(self, y: Tensor) -> Tensor:
        """Return U^T y P."""
        return _product(self.u.T, y, self.p)

    def _image(self, coefficients: Tensor) -> Tensor:
        """Return U c P^T."""
        return _product(self.u, coefficients, self.p.T)


def _decomposed(matrix: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u, torch.where(s < threshold, 0.0, s), vt.T


def _product(left: Tensor, image: Tensor, right: Tensor) -> Tensor:
    if image.shape[-2:] != (left.shape[1], right.shape[0]):
        raise ValueError(f"this operator needs {left.shape[1]}x{right.shape[0]} pixels here, got {list(image.shape)}")
    return left.to(image.dtype) @ image @ right.to(image.dtype)
