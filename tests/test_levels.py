import math

import pytest
import torch
from tiny import SIZE, tiny_prior
from tiny_training import distillation, images, streams

from ud2m.physics import observe
from ud2m.training import Levels


def test_levels_have_the_stated_values_and_shares(generator):
    schedule = tiny_prior().schedule
    count, spread = 200_000, 0.25
    sigma = Levels(3, spread, 0.02, 80.0)(torch.rand(count, 2, generator=generator), schedule)
    grid = schedule.grid(3)
    shares = torch.stack([(sigma == level).double().mean() for level in grid])
    deviation = (0.25 * 0.75 / count) ** 0.5  # binomial
    assert (shares - (1 - spread) / 3).abs().max() < 5 * deviation
    others = sigma[torch.stack([sigma != level for level in grid]).all(0)].double()
    assert len(others) / count == pytest.approx(spread, abs=5 * deviation)
    assert 0.02 <= others.min() < 0.0201
    assert 79.5 < others.max() <= 80.0
    logs = others.log()  # uniform: mean and variance of the log
    width = math.log(80.0 / 0.02)
    assert logs.mean().item() == pytest.approx(math.log(0.02) + width / 2, abs=5 * width / math.sqrt(12 * len(others)))
    assert logs.std().item() == pytest.approx(width / math.sqrt(12), rel=0.02)


def test_levels_at_the_ends_of_the_uniform_numbers():
    schedule = tiny_prior().schedule
    ends = torch.tensor([[0.0, 0.9], [1.0, 0.9], [0.0, 0.0], [1.0, 0.0]])
    grid = schedule.grid(3)
    expected = torch.tensor([grid[0], grid[-1], 0.02, 80.0])
    torch.testing.assert_close(Levels(3, 0.25)(ends, schedule), expected)


def test_levels_follow_the_power_of_the_grid():
    schedule = tiny_prior().schedule
    sigma = Levels(3, 0.0, grid_power=5.0)(torch.rand(64, 2), schedule)
    torch.testing.assert_close(sigma.unique(), schedule.grid(3, 5.0).flip(0))


def test_levels_are_drawn_per_sample(prior):
    module = distillation(prior, levels=Levels(2, spread=1.0))
    prediction = module.step.predict(images(6), streams(module, 6))
    assert len(prediction.sigma.unique()) == 6


@pytest.mark.parametrize(
    "options",
    [
        *({"num_steps": 0}, {"spread": 1.5}, {"sigma_low": 0.0}, {"sigma_high": 0.01}),
        *({"grid_power": -1.0}, {"grid_power": float("inf")}),
    ],
)
def test_impossible_levels_are_refused(options):
    with pytest.raises(ValueError, match=r"must be at least 1|levels need|grid_power must be a positive number"):
        Levels(**options)


def test_noise_levels_of_a_range_are_log_uniform_and_reach_the_observations(prior, monkeypatch):
    seen = []

    def spy(physics, x0, sigma_y, streams):
        seen.append(sigma_y)
        return observe(physics, x0, sigma_y, streams)

    monkeypatch.setattr("ud2m.physics.problem.observe", spy)
    module = distillation(prior, sigma_y_range=[0.01, 0.16])
    streams = [torch.Generator().manual_seed(i) for i in range(400)]
    position = (module.step.draw_sigma_y(400, streams) / 0.01).log() / math.log(16)
    assert 0 <= position.min() < 0.02
    assert 0.98 < position.max() <= 1
    assert position.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / 400) ** 0.5)
    module.step.predict(torch.rand(4, 3, SIZE, SIZE), streams[:4])
    assert len(seen[0].unique()) == 4
    assert module.step.problem.sigma_y == module.sampler.config.sigma_y == 0.05
