"""One batch, many operators: every sample gets its own, drawn from weighted families."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor
from torch.nn.functional import pad

from ud2m.physics.blur import Blur
from ud2m.physics.data_term import DataTerm, Prox, prepared_prox
from ud2m.physics.family import OperatorFamily
from ud2m.physics.immutable import Immutable
from ud2m.physics.measurement import image_shape, measured
from ud2m.physics.rows import at_least_float32, per_sample, select_samples
from ud2m.random import Generators, rand


class Mixture(OperatorFamily):
    """Another family for every sample, and then a member of it.

    The samples of a batch that got the same family are computed together, so that a step costs about as much as with
    one operator when the families are few. Blurs belong into one ``BlurMixture``.

    Args:
        families: to draw from, all for the same images.
        weights: relative probabilities; equal by default.

    Raises:
        ValueError: for no families, or weights that are not positive, one per family.
    """

    random = True

    def __init__(self, families: Sequence[OperatorFamily], weights: Sequence[float] | None = None):
        self.families = list(families)
        self.multiple = math.lcm(*(family.multiple for family in self.families))
        self.cumulative = cumulative_weights(len(self.families), weights)

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError where one of the families does not take the images."""
        super().check(image_shape)
        for family in self.families:
            family.check(image_shape)

    def draw(
        self,
        batch_size: int,
        image_shape: tuple[int, int, int],
        generator: Generators = None,
        device: torch.device | str = "cpu",
    ) -> "Mixed":
        """Return the operators of a batch."""
        self.check(image_shape)
        which = choose(self.cumulative, batch_size, generator)
        groups = []
        for number, family in enumerate(self.families):
            rows = torch.nonzero(which == number)[:, 0]
            if len(rows):
                physics = family.draw(len(rows), image_shape, of_rows(generator, rows), device)
                y = select_samples(physics, torch.zeros(1, dtype=torch.int64)).A(
                    torch.zeros(1, *image_shape, device=device)
                )
                groups.append((rows, physics, tuple(y.shape[1:])))
        return Mixed(groups, image_shape, device)


class BlurMixture(Blur):
    """Another kind of blur for every sample, as one blur with a kernel per sample.

    Args:
        blurs: families to draw from; kernels are padded with zeros to the largest.
        weights: relative probabilities; equal by default.
        boundary: see ``Blur``; that of the blurs themselves does not matter.

    Raises:
        ValueError: for no blurs, or weights that are not positive, one per blur.
    """

    random = True

    def __init__(self, blurs: Sequence[Blur], weights: Sequence[float] | None = None, boundary: str = "circular"):
        super().__init__(boundary)
        self.blurs = list(blurs)
        self.cumulative = cumulative_weights(len(self.blurs), weights)
        self.taps = (max(b.taps[0] for b in self.blurs), max(b.taps[1] for b in self.blurs))

    def kernels(self, batch_size: int, generator: Generators = None) -> Tensor:
        """Return B kernels, [B, 1, h, w]."""
        which = choose(self.cumulative, batch_size, generator)
        kernels = torch.zeros(batch_size, 1, *self.taps, dtype=torch.float64)
        for number, blur in enumerate(self.blurs):
            rows = torch.nonzero(which == number)[:, 0]
            if len(rows):
                kernels[rows] = centred(blur.kernels(len(rows), of_rows(generator, rows)), self.taps)
        return kernels


class Mixed(Immutable, LinearPhysics):
    """A block-diagonal operator: sample b has its own A_b.

    The observations of a batch have one shape, [B, C, H, W]: where A_b gives less, its y stands in the top left corner
    and the rest is 0 and no measurement (``measured``).

    Args:
        groups: the samples' numbers, int64 [n] and rising, the operator of those n samples, and the shape of one of its
            observations; together all samples.
        image_shape: (C, H, W).
        device: where the operator lives.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Tensor, LinearPhysics, tuple[int, ...]]],
        image_shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
    ):
        super().__init__(img_size=tuple(image_shape))
        self.img_size = self.image_shape = image_shape
        self.rows = [rows.to(device) for rows, _, _ in groups]
        self.parts = torch.nn.ModuleList(physics for _, physics, _ in groups)
        self.y_shapes = [y_shape for _, _, y_shape in groups]

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Return A_b x_b for every sample."""
        self.update_parameters(**kwargs)
        return self.join(lambda part, rows, _: part.A(x[rows]), x)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return A_b^T y_b for every sample."""
        self.update_parameters(**kwargs)
        return self.join(lambda part, rows, shape: part.A_adjoint(corner(y[rows], shape)), y)

    def A_dagger(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return A_b^dagger y_b for every sample."""
        self.update_parameters(**kwargs)
        return self.join(lambda part, rows, shape: part.A_dagger(corner(y[rows], shape)), y)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: Tensor | float, **kwargs: Any) -> Tensor:
        """Return the prox of every sample's own data term; ``gamma`` as for the operators of this package."""
        self.update_parameters(**kwargs)
        dtype = at_least_float32(z, y)
        return self.prepared(y.to(dtype))(gamma)(z.to(dtype)).to(z.dtype)

    def prepared(self, y: Tensor) -> Prox:
        """Return ``prepared_prox`` for y in float32 or float64."""
        self._check(y)
        parts = [
            prepared_prox(cast(DataTerm, part), corner(self._picked(y, rows), shape))
            for part, rows, shape in zip(self.parts, self.rows, self.y_shapes, strict=True)
        ]

        def weighted(gamma: Tensor | float) -> Callable[[Tensor], Tensor]:
            weight = per_sample(gamma, y).reshape(-1).expand(len(y))
            solvers = [part(weight[rows].view(-1, 1, 1, 1)) for part, rows in zip(parts, self.rows, strict=True)]

            def solve(z: Tensor) -> Tensor:
                self._check(z)
                return self._ordered([one(self._picked(z, rows)) for one, rows in zip(solvers, self.rows, strict=True)])

            return solve

        return weighted

    def join(self, product: Callable[[LinearPhysics, Tensor, tuple[int, ...]], Tensor], like: Tensor) -> Tensor:
        """Return ``product(operator, samples' numbers, shape of y)`` of all groups, in the order of the samples."""
        self._check(like)
        return self._ordered([product(*group) for group in zip(self.parts, self.rows, self.y_shapes, strict=True)])

    def _check(self, like: Tensor) -> None:
        if tuple(like.shape[1:]) != tuple(self.img_size) or len(like) != sum(map(len, self.rows)):
            raise ValueError(
                f"the operators were made for {sum(map(len, self.rows))} images {list(self.img_size)} and take "
                f"observations of that shape, got {list(like.shape)}"
            )

    def _picked(self, images: Tensor, rows: Tensor) -> Tensor:
        return images if len(self.rows) == 1 else images[rows]

    def _ordered(self, parts: Sequence[Tensor]) -> Tensor:
        joined = torch.cat([enlarged(part, self.img_size) for part in parts])
        return joined if len(self.rows) == 1 else joined[torch.cat(self.rows).argsort()]

    def select(self, index: Tensor) -> "Mixed":
        """Return the operator of the samples ``index``."""
        groups = []
        for rows, part, y_shape in zip(self.rows, self.parts, self.y_shapes, strict=True):
            place = torch.full((sum(map(len, self.rows)),), -1, device=rows.device)
            place[rows] = torch.arange(len(rows), device=rows.device)
            wanted = place[index.to(rows.device)]
            chosen = torch.nonzero(wanted >= 0)[:, 0]
            if len(chosen):
                groups.append((chosen, select_samples(cast(LinearPhysics, part), wanted[chosen]), y_shape))
        return Mixed(groups, self.image_shape, self.rows[0].device)


@prepared_prox.register
def _(physics: Mixed, y: Tensor) -> Prox:
    return physics.prepared(y.to(at_least_float32(y)))


@select_samples.register
def _(physics: Mixed, index: Tensor) -> Mixed:
    return physics.select(index)


@measured.register
def _(physics: Mixed, y: Tensor) -> Tensor:
    def of_part(part: LinearPhysics, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        own = corner(y[rows], shape)
        return measured(part, own).to(y).expand_as(own)

    return physics.join(of_part, y)


@image_shape.register
def _(physics: Mixed, y: Tensor) -> tuple[int, int, int]:
    return physics.image_shape


def corner(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the top left corner [B, *shape] of y [B, C, H, W]."""
    return y[:, : shape[0], : shape[1], : shape[2]]


def enlarged(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return y in the top left corner of zeros [B, *shape]."""
    if y.shape[1:] == shape:
        return y
    channels, height, width = (full - own for full, own in zip(shape, y.shape[1:], strict=True))
    return pad(y, (0, width, 0, height, 0, channels))


def centred(kernels: Tensor, taps: tuple[int, int]) -> Tensor:
    """Pad kernels [B, 1, h, w] with zeros to larger ``taps`` so that their centre (h // 2, w // 2) stays the centre."""
    top, left = (full // 2 - own // 2 for full, own in zip(taps, kernels.shape[-2:], strict=True))
    return pad(kernels, (left, taps[1] - kernels.shape[-1] - left, top, taps[0] - kernels.shape[-2] - top))


def cumulative_weights(count: int, weights: Sequence[float] | None) -> Tensor:
    """Return the cumulative distribution of relative weights, float64 [count]; equal ones by default."""
    values = [1.0] * count if weights is None else [float(w) for w in weights]
    if count < 1 or len(values) != count or not all(0 < w < float("inf") for w in values):
        raise ValueError(f"a mixture needs positive weights, one for each of its {count} families, got {values}")
    cumulative = torch.tensor(values, dtype=torch.float64).cumsum(0)
    return cumulative / cumulative[-1]


def choose(cumulative: Tensor, batch_size: int, generator: Generators) -> Tensor:
    """Return B numbers of the distribution, int64 [B]."""
    uniform = rand((batch_size, 1), generator)[:, 0].double()
    return torch.searchsorted(cumulative, uniform, right=True).clamp(max=len(cumulative) - 1)


def of_rows(generator: Generators, rows: Tensor) -> Generators:
    """Return the generators of some rows, where there is one for each."""
    return [generator[row] for row in rows.tolist()] if isinstance(generator, Sequence) else generator
