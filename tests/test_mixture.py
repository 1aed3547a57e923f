"""Batches in which every sample has its own operator, against a loop over the samples."""

import math

import pytest
import torch
from dense_prox import joint_prox
from operators import generator

from ud2m.physics import (
    BlurMixture,
    GaussianBlur,
    Inpainting,
    Mixture,
    MotionBlur,
    RandomGaussianBlur,
    SuperResolution,
    UniformBlur,
    image_shape,
    measured,
    observe,
    residual,
    select_samples,
)
from ud2m.physics.mixture import centred

SHAPE = (3, 16, 20)
FAMILIES = [
    BlurMixture([UniformBlur(3), MotionBlur(5)]),
    SuperResolution(2),
    SuperResolution(4, "box"),
    Inpainting(0.6),
]


def streams(count: int) -> list[torch.Generator]:
    return [generator(100 + i) for i in range(count)]


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=generator(seed), dtype=torch.float64)


def test_a_mixture_equals_a_loop_over_its_samples():
    """Samples draw from their own streams, so that alone or in a batch they get the same operator."""
    family = Mixture(FAMILIES)
    physics, x, z = family.draw(8, SHAPE, streams(8)), images(8), images(8, 1)
    assert len(physics.parts) == 4, "all families are met"
    y = observe(physics, x, 0.05, streams(8))
    level = torch.linspace(0.02, 0.3, 8, dtype=torch.float64)
    u = joint_prox(physics, y, z, x, 2 * level, level**2, 1.0, level)
    for i in range(8):
        alone = family.draw(1, SHAPE, [streams(8)[i]])
        one = slice(i, i + 1)
        torch.testing.assert_close(observe(alone, x[one], 0.05, [streams(8)[i]]), y[one])
        torch.testing.assert_close(alone.A_adjoint(y[one]), physics.A_adjoint(y)[one])
        torch.testing.assert_close(alone.A_dagger(y[one]), physics.A_dagger(y)[one])
        expected = joint_prox(alone, y[one], z[one], x[one], 2 * level[i], level[i] ** 2, 1.0, level[i])
        torch.testing.assert_close(u[one], expected)
        chosen = select_samples(physics, torch.tensor([i, i]))
        torch.testing.assert_close(chosen.A(x[[i, i]]), physics.A(x)[[i, i]])


def test_observations_stand_in_the_corner_and_count_once():
    physics = Mixture([SuperResolution(4, "box")]).draw(3, SHAPE, generator())
    x = images(3)
    y = observe(physics, x, 0.1, generator(1))
    assert y.shape == x.shape
    weight = measured(physics, y)
    assert weight.sum().item() == 3 * 3 * 4 * 5
    assert (y[weight == 0] == 0).all()
    alone = SuperResolution(4, "box").draw(3, SHAPE)
    torch.testing.assert_close(physics.A(x)[..., :4, :5], alone.A(x))
    torch.testing.assert_close(residual(physics, x, y, 0.1), residual(alone, x, y[..., :4, :5], 0.1))


def test_families_come_as_often_as_their_weights_say():
    family = Mixture(FAMILIES[1:], weights=[1, 2, 5])
    physics = family.draw(800, (1, 16, 16), generator(3))
    for rows, share in zip(physics.rows, (1 / 8, 2 / 8, 5 / 8), strict=True):
        assert len(rows) / 800 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 800))
    assert torch.cat(physics.rows).sort()[0].equal(torch.arange(800))
    again = family.draw(800, (1, 16, 16), generator(3))
    assert all(torch.equal(a, b) for a, b in zip(physics.rows, again.rows, strict=True))


def test_a_mixture_of_blurs_is_one_blur_with_their_kernels():
    family = BlurMixture([UniformBlur(2), GaussianBlur(0.8)])
    x = images(12)
    y = family.draw(12, SHAPE, generator(1)).A(x)
    candidates = torch.stack([blur.draw(12, SHAPE).A(x) for blur in family.blurs])
    distance = (candidates - y).abs().amax((2, 3, 4))  # [2, 12]
    assert (distance.min(0).values < 1e-6).all()
    assert (distance < 1e-6).any(1).all(), "both kinds are met"


@pytest.mark.parametrize("own", [(3, 3), (2, 5), (4, 4)])
def test_padding_keeps_the_centre_of_a_kernel(own):
    from ud2m.physics import CircularBlur

    kernel = torch.rand(1, 1, *own, generator=generator(), dtype=torch.float64)
    x = images(1)
    expected = CircularBlur(kernel, SHAPE).A(x)
    torch.testing.assert_close(CircularBlur(centred(kernel, (7, 6)), SHAPE).A(x), expected, rtol=0, atol=1e-6)


def test_random_gaussian_kernels_stay_inside_their_widths():
    kernels = RandomGaussianBlur((0.8, 2.0)).kernels(300, generator(0))[:, 0]
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(300, dtype=torch.float64))
    offset = torch.arange(kernels.shape[-1]) - (kernels.shape[-1] - 1) / 2
    xx, yy = (kernels.sum(1) * offset**2).sum(1), (kernels.sum(2) * offset**2).sum(1)
    xy = torch.einsum("bij,i,j->b", kernels, offset.double(), offset.double())
    matrices = torch.stack([torch.stack([xx, xy], -1), torch.stack([xy, yy], -1)], -2)
    widths = torch.linalg.eigvalsh(matrices).sqrt()
    assert widths.min() > 0.78
    assert widths.max() < 2.02
    assert widths[:, 0].min() < 0.85
    assert widths[:, 1].max() > 1.95
    assert (xy.abs() > 0.5).float().mean() > 0.1, "axes are turned"


def test_a_range_of_missing_shares():
    masks = Inpainting((0.2, 0.9)).draw(200, (1, 32, 32), generator(0)).mask
    missing = 1 - masks.mean((1, 2, 3))
    assert missing.min() < 0.25
    assert missing.max() > 0.85
    assert missing.mean().item() == pytest.approx(0.55, abs=4 * 0.7 / math.sqrt(12 * 200))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture([]), "each of its 0 families"),
        (lambda: Mixture(FAMILIES, [1, 2]), r"4 families, got \[1.0, 2.0\]"),
        (lambda: Mixture(FAMILIES, [1, 2, 0, 1]), "positive weights"),
        (lambda: BlurMixture([UniformBlur(3)], [-1.0]), "positive weights"),
        (lambda: Inpainting((0.5, 0.2)), r"inside \(0, 1\)"),
        (lambda: RandomGaussianBlur((2.0, 1.0)), "rise"),
        (lambda: Mixture(FAMILIES).draw(1, (3, 18, 20)), "factor 4 does not divide"),
        (lambda: Mixture(FAMILIES).draw(2, SHAPE, generator()).A(torch.zeros(3, *SHAPE)), "made for 2 images"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_mixture_names_the_shape_of_the_images_whatever_the_batch():
    """A sampler that draws several batches asks for the shape first; the operators need not be applied for that."""
    physics = Mixture(FAMILIES).draw(6, SHAPE, streams(6))
    assert image_shape(physics, observe(physics, images(6), 0.05, streams(6))) == SHAPE
