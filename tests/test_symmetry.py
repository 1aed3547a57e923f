"""Random orientations: every one occurs, each is undone, and a denoiser that knows no directions is left alone."""

import pytest
import torch
from tiny import SIZE, adapted, tiny_network, tiny_prior

from ud2m.physics import GaussianBlur
from ud2m.samplers.ud2m import PosteriorSampler, SamplerConfig
from ud2m.unfolded.denoisers import symmetric


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def orientations(x):
    """Return the eight images T x of the square's symmetries, with the T^-1 that undoes each, written out."""
    return [
        (torch.rot90(x, turns, (-2, -1)).flip(axes), lambda r, t=turns, a=axes: torch.rot90(r.flip(a), -t, (-2, -1)))
        for turns in range(4)
        for axes in ((), (-1,))
    ]


def ramp(z, sigma):
    """A denoiser that knows left from right and up from down."""
    columns, rows = torch.arange(z.shape[-1]), torch.arange(z.shape[-2]).view(-1, 1)
    return z * (1 + columns) + 7 * rows


@pytest.mark.parametrize(("shape", "count", "number"), [((5, 5), 8, 8), ((5, 6), 8, 4), ((5, 5), 2, 2), ((5, 6), 1, 1)])
def test_every_orientation_occurs_and_is_undone(shape, count, number):
    x = torch.rand(1, 2, *shape, generator=generator())
    results = symmetric(ramp, count, generator(1))(x.expand(400, -1, -1, -1), torch.ones(400))
    found = results.flatten(1).unique(dim=0)
    assert len(found) == number
    expected = torch.stack([undo(ramp(turned, None)) for turned, undo in orientations(x) if turned.shape == x.shape])
    for row in found:
        assert (expected.flatten(1) - row).abs().amax(1).min() < 1e-5
    # all about equally often
    counts = torch.stack([(results.flatten(1) == row).all(1).sum() for row in found])
    assert counts.min() > 0.5 * 400 / number


def test_a_denoiser_without_directions_is_left_alone():
    x, sigma = torch.rand(3, 1, 4, 4, generator=generator()), torch.tensor([0.1, 0.2, 0.3])

    def shrink(z, level):
        return z / (1 + level.view(-1, 1, 1, 1))

    torch.testing.assert_close(symmetric(shrink, 8, generator(1))(x, sigma), shrink(x, sigma))
    assert symmetric(shrink, 1, None) is shrink


def test_a_sample_turns_as_its_own_stream_says():
    x = torch.rand(4, 1, 6, 6, generator=generator())
    together = symmetric(ramp, 8, [generator(k) for k in range(4)])(x, torch.ones(4))
    for k in range(4):
        alone = symmetric(ramp, 8, [generator(k)])(x[k : k + 1], torch.ones(1))
        torch.testing.assert_close(together[k : k + 1], alone)


def test_the_sampler_takes_them_from_its_configuration_or_the_call():
    prior = adapted(tiny_prior())
    network = tiny_network(prior)
    x = torch.rand(1, 3, SIZE, SIZE, generator=generator())
    physics = GaussianBlur(1.0).draw(1, (3, SIZE, SIZE))

    def run(default, **options):
        config = SamplerConfig(symmetries=default)
        return PosteriorSampler(network, config)(physics.A(x), physics, 0.05, generator=generator(2), **options)

    torch.testing.assert_close(run(8), run(1, symmetries=8))
    assert not torch.allclose(run(8), run(1), atol=1e-4)
    for count in (3, 0, "all", True):
        with pytest.raises(ValueError, match=r"symmetries must be 1 \(none\), 2 .* or 8"):
            run(1, symmetries=count)
    with pytest.raises(ValueError, match="symmetries must be"):
        SamplerConfig(symmetries=4)
