"""Operators of others: what is found out about them before anything is sampled, by applying them."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from deepinv.physics import DecomposablePhysics, LinearPhysics
from deepinv.utils import TensorList
from torch import Tensor

from ud2m.physics.data_term import DataTerm
from ud2m.physics.immutable import Immutable
from ud2m.physics.iterative import ConjugateGradients
from ud2m.physics.measurement import image_shape, measured
from ud2m.physics.rows import at_least_float32, per_sample, select_samples, with_tensors
from ud2m.precision import full_precision

TOLERANCE = 1e-3
"""Relative error from which on a product is taken for another one, not for a rounded one."""
WEIGHTS = (1e3, 10.0)
"""Values of gamma at which a prox is tried."""

PRECISIONS = (torch.float32, torch.float64)

Measured: TypeAlias = Tensor | TensorList


class Adopted(ConjugateGradients, Immutable, LinearPhysics):
    """An operator of deepinv whose products were tried; no call changes its parameters.

    Computed in ``dtype`` or, when that is None, in the precision of the images, but not below float32: under a
    mixed-precision context its products would be rounded. Observations in several parts (deepinv's ``TensorList``) are
    laid one after the other, [B, m].

    Args:
        inner: the operator.
        img_size: (C, H, W).
        parts: shape of an observation, (...); or of each of its parts.
        dtype: see above.
        rows: names of the buffers that hold a row for each sample.
        exact: whether its ``correction`` is right; else the prox is solved by ``ConjugateGradients``.
    """

    inner: LinearPhysics
    recipe: Callable[[], DataTerm] | None = None
    """What makes it again, where that is known: deepinv's Tomography cannot be pickled."""

    def __init__(
        self,
        inner: LinearPhysics,
        img_size: tuple[int, int, int],
        parts: list[tuple[int, ...]] | tuple[int, ...],
        dtype: torch.dtype | None = None,
        rows: tuple[str, ...] = (),
        exact: bool = False,
    ):
        super().__init__(img_size=img_size)
        self.img_size, self.parts, self.inner, self.dtype = img_size, parts, inner, dtype
        self.rows, self.exact = rows, exact
        self.y_shape: tuple[int, ...] = (sum(map(math.prod, parts)),) if isinstance(parts, list) else parts

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return A x."""
        self.update_parameters(**kwargs)
        return self._computed(lambda image: joined(self.inner.A(image)), x, self.img_size)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return A^T y."""
        self.update_parameters(**kwargs)
        return self._computed(lambda data: self.inner.A_adjoint(self._parted(data)), y, self.y_shape)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float, **kwargs: Any) -> Tensor:
        """Return argmin_u gamma |A u - y|^2 / 2 + |u - z|^2 / 2; gamma as for ``ConjugateGradients``."""
        if not self.exact:
            return super().prox_l2(z, y, gamma, **kwargs)
        self.update_parameters(**kwargs)
        mean = z.to(at_least_float32(z, y))
        weight = per_sample(gamma, mean)
        # the equations of the prox are linear, and from z on nothing large is subtracted
        mismatch = y.to(mean) - self.A(mean)
        step = self._computed(lambda r: correction(self.inner, r, self.img_size, weight.to(r)), mismatch, self.y_shape)
        return (mean + step).to(z.dtype)

    def select(self, index: Tensor) -> "Adopted":
        """Return the operator of the samples ``index``."""
        if not self.rows:
            return self
        inner = with_tensors(self.inner, lambda name, t: t[index.to(t.device)] if name in self.rows else t)
        return Adopted(inner, self.img_size, self.parts, self.dtype, self.rows, self.exact)

    def __reduce__(self) -> Any:
        return super().__reduce__() if self.recipe is None else (self.recipe, ())

    def _parted(self, y: Tensor) -> Measured:
        if not isinstance(self.parts, list):
            return y
        pieces = y.split([math.prod(part) for part in self.parts], dim=1)
        return TensorList([piece.unflatten(1, part) for piece, part in zip(pieces, self.parts, strict=True)])

    def _computed(self, product: Callable[[Tensor], Tensor], x: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(x.shape[1:]) != shape:
            raise ValueError(f"the operator takes [B, {', '.join(map(str, shape))}] here, got {list(x.shape)}")
        with full_precision(x.device):
            return product(x.to(self.dtype or at_least_float32(x))).to(x.dtype)


@image_shape.register
def _(physics: Adopted, y: Tensor) -> tuple[int, int, int]:
    return physics.img_size


@measured.register
def _(physics: Adopted, y: Tensor) -> Tensor:
    return measured(physics.inner, y)


@select_samples.register
def _(physics: Adopted, index: Tensor) -> Adopted:
    return physics.select(index)


def correction(physics: LinearPhysics, r: Tensor, img_size: tuple[int, int, int], gamma: Tensor) -> Tensor:
    """Return argmin_d gamma |A d - r|^2 / 2 + |d|^2 / 2 = V s U^T r / (s^2 + 1 / gamma) for A = U s V^T.

    deepinv's own formula multiplies by gamma what rounding has left where s = 0. Of an operator without singular values
    it is its prox.
    """
    if not isinstance(physics, DecomposablePhysics):
        return physics.prox_l2(r.new_zeros(len(r), *img_size), r, gamma)
    coefficients = physics.U_adjoint(r)
    s = torch.as_tensor(physics.mask, device=r.device)
    ridge = 1 / gamma.reshape(-1, *(1,) * (coefficients.ndim - 1))
    gain = s.conj() / (s * s.conj()).real.add(ridge).clamp_min(torch.finfo(r.dtype).tiny)
    return physics.V(gain * coefficients)


def joined(y: Measured) -> Tensor:
    """Return an observation in several parts as one [B, m], and any other as it is."""
    return torch.cat([part.flatten(1) for part in y], dim=1) if isinstance(y, TensorList) else y


@torch.no_grad()
def adopt(physics: DataTerm, y: Measured) -> DataTerm:
    """Return an operator that is right for observations y: those of this package as they are, one of deepinv tried out.

    Nothing is guessed from shapes. It is applied to random images, which tells whether A^T is the adjoint of A, whether
    all samples share its parameters or each has its own, which buffers hold these, and in which precision it computes.
    Singular values, or a prox that a user wrote, are used where they solve its equations. Any other prox of deepinv is
    iterated for 50 steps at most and its samples disturb each other: ``ConjugateGradients`` takes its place.

    Args:
        physics: the operator.
        y: observations [B, ...].

    Raises:
        ValueError: for an operator that does not fit y, is not linear, does not act on images [B, C, H, W], or has
            parameters that cannot be told apart.
    """
    if isinstance(physics, Immutable) or not isinstance(physics, LinearPhysics):
        return physics
    return _Trial(physics, y).result()


class _Trial:
    """Products of an operator with random images."""

    def __init__(self, physics: LinearPhysics, y: Measured):
        self.physics, self.name = in_float32(physics), f"the operator {type(physics).__name__}"
        self.parts: Any = [tuple(p.shape[1:]) for p in y] if isinstance(y, TensorList) else tuple(y.shape[1:])
        self.y, self.count = joined(y), len(joined(y))

    def result(self) -> Adopted:
        found = self.in_some_precision()
        images = self.random(self.count + 1, found.img_size)
        rows = () if self.shared(found, images) else self.rows(found, images)
        found = Adopted(self.physics, found.img_size, self.parts, found.dtype, rows)
        self.check_adjoint(found, images[: self.count])
        exact = Adopted(self.physics, found.img_size, self.parts, found.dtype, rows, exact=True)
        return exact if self.has_closed_form() and self.solves(exact, images[: self.count]) else found

    def in_some_precision(self) -> Adopted:
        """Return the operator in the precision of its images or, where it takes one alone, in that."""
        taken, refusal = [], ""
        for dtype in dict.fromkeys((at_least_float32(self.y), *PRECISIONS)):
            try:
                taken.append(self.tried(dtype))
            except Exception as error:  # whatever others' code raises
                refusal = refusal or " ".join(str(error).split()) or type(error).__name__
        if not taken:
            raise ValueError(
                f"{self.name} does not fit observations of shape {[self.count, *self.y.shape[1:]]}: {refusal}; the "
                "first number is that of the observations"
            )
        return Adopted(self.physics, taken[0].img_size, self.parts, None if refusal == "" else taken[0].dtype)

    def tried(self, dtype: torch.dtype) -> Adopted:
        image = Adopted(self.physics, (1, 1, 1), self.parts, dtype).A_adjoint(self.y.to(dtype))
        if image.ndim != 4 or image.is_complex():
            raise ValueError(f"it acts on {image.dtype} images {list(image.shape)}, not on [B, C, H, W]")
        channels, height, width = image.shape[1:]
        found = Adopted(self.physics, (channels, height, width), self.parts, dtype)
        y = found.A(image)
        if y.shape != self.y.shape:
            raise ValueError(f"it makes observations {list(y.shape)} of these images {list(image.shape)}")
        return found

    def shared(self, found: Adopted, images: Tensor) -> bool:
        """Return whether A is the same for all samples, and for another number of them."""
        try:
            whole, turned, first = found.A(images), found.A(images.flip(0)).flip(0), found.A(images[:1])
        except Exception:  # as of parameters for a certain number of samples
            return False
        return len(whole) == len(images) and close(turned, whole) and close(first, whole[:1])

    def rows(self, found: Adopted, images: Tensor) -> tuple[str, ...]:
        """Return the buffers that hold a row for each sample: with other rows of them A is that of other samples."""
        tensors = [*self.physics.named_buffers(), *self.physics.named_parameters()]
        names = tuple(name for name, tensor in tensors if tensor.ndim and len(tensor) == self.count)
        index = torch.tensor([*reversed(range(self.count)), 0])
        try:
            whole = found.A(images[: self.count])
            chosen = Adopted(self.physics, found.img_size, self.parts, found.dtype, names).select(index)
            if names and close(chosen.A(images[index]), whole[index]):
                return names
        except Exception as error:
            raise self.unknown(error) from error
        raise self.unknown(None)

    def unknown(self, error: Exception | None) -> ValueError:
        reason = f" ({' '.join(str(error).split())})" if error else ""
        return ValueError(
            f"{self.name} gives samples another result with other samples beside them, or in every call, and which of "
            f"its parameters belong to which of these {self.count} observations cannot be found out{reason}; sample "
            "one observation at a time, with an operator for it alone"
        )

    def check_adjoint(self, found: Adopted, images: Tensor) -> None:
        """Compare <A x, v> with <x, A^T v> for v near A x: a wrong scale is seen as well as a wrong shape."""
        y = found.A(images)
        tiny = torch.finfo(y.dtype).tiny
        noise = self.random(len(y), tuple(y.shape[1:])) - 0.5
        v = scaled(y, 1 / norm(y).clamp_min(tiny)) + scaled(noise, 1 / norm(noise))
        error = (inner(y, v) - inner(images, found.A_adjoint(v.to(y)))).abs() / norm(y).clamp_min(tiny)
        if not (error < TOLERANCE).all():  # nor NaN
            raise ValueError(
                f"{self.name} is not linear, or its A_adjoint is not the adjoint of its A: <A x, v> and <x, A^T v> "
                f"differ by {error.max().item():.1g} of |A x| |v|; samplers need the adjoint itself"
            )

    def has_closed_form(self) -> bool:
        whose = type(self.physics).prox_l2.__module__
        return isinstance(self.physics, DecomposablePhysics) or not whose.startswith("deepinv.")

    def solves(self, exact: Adopted, images: Tensor) -> bool:
        """Return whether u = prox satisfies gamma A^T (A u - y) + u - z = 0 with another gamma for every sample."""
        z = images.flip((2, 3))
        try:
            y = exact.A(images)
            for first in WEIGHTS:
                gamma = torch.linspace(first, first / 2, len(z)).to(z).view(-1, 1, 1, 1)
                u = exact.prox_l2(z, y, gamma)
                if not (norm(gamma * exact.A_adjoint(exact.A(u) - y) + u - z) < TOLERANCE * norm(z)).all():
                    return False
        except Exception:  # it does not take such a gamma
            return False
        return True

    def random(self, count: int, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(count)
        return torch.rand(count, *shape, generator=generator, dtype=torch.float32).to(self.y.device).to(self.y)


def in_float32(physics: LinearPhysics) -> LinearPhysics:
    """Return an operator with float32 in the place of half precision: the same numbers, and products that are right."""
    small = [t for t in (*physics.buffers(), *physics.parameters()) if t.dtype in (torch.float16, torch.bfloat16)]
    if not small:
        return physics
    return with_tensors(physics, lambda name, t: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t)


def norm(x: Tensor) -> Tensor:
    """Return |x| of each sample, [B]."""
    return x.flatten(1).cpu().double().norm(dim=1)


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Return <x, y> of each sample, [B]."""
    return (x.cpu().double() * y.cpu().double()).flatten(1).sum(1)


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Return x with each sample times its factor [B]."""
    return x * factor.to(x).view(-1, *(1,) * (x.ndim - 1))


def close(x: Tensor, y: Tensor) -> bool:
    """Return whether results are equal up to rounding."""
    return x.shape == y.shape and bool(((x - y).abs().max() < TOLERANCE * y.abs().max()).all())
