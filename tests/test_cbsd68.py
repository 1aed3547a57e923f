"""Priors as denoisers on CBSD68."""

import itertools
import sys

import pytest
import torch
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import cbsd68


def test_the_mean_of_eight_orientations_is_that_over_the_group_of_the_square():
    """A lopsided linear denoiser becomes the mean over all flips across, flips down and transposes, one by one."""

    def lopsided(x):
        return 0.5 * x + 0.3 * x.roll(1, -1) + 0.2 * x.roll(2, -2)

    def turned(x, across, down, transposed):
        x = x.transpose(-2, -1) if transposed else x
        return x.flip([axis for axis, flipped in ((-1, across), (-2, down)) if flipped])

    def turned_back(x, across, down, transposed):
        x = x.flip([axis for axis, flipped in ((-1, across), (-2, down)) if flipped])
        return x.transpose(-2, -1) if transposed else x

    x = torch.rand(1, 3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    group = list(itertools.product((False, True), repeat=3))
    expected = torch.stack([turned_back(lopsided(turned(x, *coins)), *coins) for coins in group]).mean(0)
    torch.testing.assert_close(cbsd68.averaged(lopsided)(x), expected)
    assert not torch.allclose(lopsided(x), expected)


def test_priors_to_average_are_among_those_to_measure(tmp_path):
    with pytest.raises(ValueError, match="got photographs_prior; add to --prior"):
        cbsd68.main([str(tmp_path), "--prior", "photos_prior", "--averaged", "photographs_prior"])
