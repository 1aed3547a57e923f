"""The study of wrong models: what is told, and which residual is reported."""

import sys

import pytest
import torch
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import cross_operators
from tables import row_of
from ud2m.physics import GaussianBlur, Problem, residual
from ud2m.samplers.base import Sampler


class Truth(Sampler):
    """A sampler that knows the images, and keeps what it was told."""

    def __init__(self, x0):
        super().__init__()
        self.x0, self.told = x0, []

    def draw(self, observation, streams):
        self.told.append(observation)
        return self.x0.repeat_interleave(len(observation) // len(self.x0), 0)


def test_the_residual_of_the_truth_falls_with_the_noise_level_that_is_told():
    x0 = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    truth, problem = Truth(x0), Problem(GaussianBlur(1.6), 0.02)
    for factor in (0.5, 1.0, 2.0):
        told = cross_operators.Told(truth, factor)
        row_of(told, problem, [x0], 2)
        assert told.residual() == pytest.approx(1 / factor, rel=0.05)
        assert truth.told[-1].sigma_y.tolist() == pytest.approx(8 * [factor * 0.02])


def test_another_kernel_is_believed_and_its_residual_reported():
    x0 = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    truth, problem, other = Truth(x0), Problem(GaussianBlur(1.6), 0.02), GaussianBlur(1.2)
    told = cross_operators.Told(truth, family=other)
    row_of(told, problem, [x0], 2)
    y = problem.observe(x0).y
    expected = residual(other.draw(4, (3, 24, 24)), x0, y, 0.02).mean().item()
    assert told.residual() == pytest.approx(expected)
    assert expected > 1.5


def test_a_cell_holds_psnr_lpips_and_residual():
    assert cross_operators.cell({"psnr_mean": 31.257, "lpips": 0.04567, "residual": 0.9876}) == "31.26 / 0.046 / 0.99"
    assert cross_operators.cell({"psnr_mean": 31.257, "residual": 0.9876}) == "31.26 / – / 0.99"
