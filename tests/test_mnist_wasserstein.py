"""The study on digits: the law that its noise is shown with, its digits, and a picture's row."""

import importlib
import sys

import pytest
import torch
from conftest import REPOSITORY

from ud2m.evaluation.calibration import conditional_frechet, debiased_conditional_frechet
from ud2m.physics import Denoising, Observation
from ud2m.samplers.base import Sampler

sys.path[:0] = [str(REPOSITORY / "benchmarks")]
study = importlib.import_module("mnist_wasserstein")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(count, seed):
    """y [n, 1, 1, 2] and x [n, 1, 2, 2] with x = A y + 0.3 + noise of another width per pixel."""
    y = torch.randn(count, 1, 1, 2, generator=generator(seed))
    noise = torch.randn(count, 4, generator=generator(seed + 1)) * torch.tensor([0.1, 0.2, 0.4, 0.8])
    x = y.flatten(1) @ torch.tensor([[1.0, 0.5, 0.0, -1.0], [0.0, 2.0, 1.0, 0.5]]) + 0.3 + noise
    return x.view(-1, 1, 2, 2), y


def test_draws_of_the_law_have_the_conditional_moments_that_it_was_fitted_to():
    law = study.GaussianLaw(*linear(20000, 0))
    x, y = linear(20000, 10)
    observation = Observation.of(y, Denoising().draw(1, (1, 1, 2)), 1.0)
    drawn = torch.stack([law.draw(observation, [generator(5 + 2 * i + s) for i in range(20000)]) for s in (0, 1)], 1)
    assert drawn.shape == (20000, 2, 1, 2, 2)
    for sample in drawn.unbind(1):
        assert conditional_frechet(x.flatten(1), sample.flatten(1), y.flatten(1)) < 2e-3
        assert abs(debiased_conditional_frechet(x.flatten(1), sample.flatten(1), y.flatten(1))) < 2e-3
    # and are no copies of one another
    assert (drawn[:, 0] - drawn[:, 1]).square().mean(0).flatten().tolist() == pytest.approx(
        [2 * width**2 for width in (0.1, 0.2, 0.4, 0.8)], rel=0.05
    )


def test_digits_of_the_study_and_those_of_the_law_are_disjoint_and_all(shared):
    chosen, others = study.digits(shared / "data" / "mnist", 20)
    assert chosen.shape == (20, 1, 32, 32)
    assert others.shape == (9980, 1, 32, 32)
    again, _ = study.digits(shared / "data" / "mnist", 40)
    torch.testing.assert_close(again[::2], chosen)
    with pytest.raises(ValueError, match=r"2\.\.5000, got 5001"):
        study.digits(shared / "data" / "mnist", 5001)


def test_a_cell_shows_both_distances():
    row = {"cw2": 1.4567, "cw2_low": 1.4, "cw2_high": 1.5, "cw2_debiased": -0.123}
    assert study.text(row) == "-0.12 (1.46 [1.40, 1.50])"


class Constant(Sampler):
    """A model that draws one grey level, in the precision that it is evaluated in."""

    def draw(self, observation, streams):
        drawn = torch.nn.functional.linear(torch.ones(1, 1), torch.full((1, 1), 1 / 3))
        return drawn.expand(len(observation), 1, 32, 32)


def test_models_are_evaluated_in_bfloat16_and_scored_in_float32():
    y = torch.zeros(2, 1, 8, 8)
    drawn = study.InBfloat16(Constant())(y, Denoising().draw(1, (1, 8, 8)), 0.01, 3)
    assert drawn.dtype == torch.float32
    assert drawn[0, 0, 0, 0, 0] == torch.tensor(1 / 3).bfloat16()


def test_a_row_of_the_picture_has_its_columns():
    shown = study.pictures(torch.rand(1, 1, 32, 32, generator=generator()), Constant(), 3)
    assert list(shown) == [
        "reference", "observed", "sample 1", "sample 2", "sample 3", "sample 4", "mean of 32", "std (0 ... 0.5)"
    ]  # fmt: skip
    assert shown["observed"].shape == (3, 8, 8)
    torch.testing.assert_close(shown["mean of 32"], torch.full((3, 32, 32), 1 / 3))
