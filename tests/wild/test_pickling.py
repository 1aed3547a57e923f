"""Operators can be pickled, and sent to workers."""

import io
import multiprocessing
import pickle

import deepinv.physics as dp
import pytest
import torch
from operators import BATCH, CASES, generator

from ud2m.physics import (
    DeepinvOperator,
    GaussianBlur,
    Jpeg,
    MissingStrokes,
    Mixture,
    MotionBlur,
    Observation,
    RandomGaussianBlur,
    SuperResolution,
    measured,
    select_samples,
)


def restored(operator):
    return pickle.loads(pickle.dumps(operator))


@pytest.mark.parametrize("case", CASES)
def test_operators_come_back_the_same(case):
    physics, shape = CASES[case]()
    other = restored(physics)
    x, z = (torch.rand(BATCH, *shape, generator=generator(i), dtype=torch.float64) for i in range(2))
    y = physics.A(x)
    assert torch.equal(other.A(x), y)
    assert torch.equal(other.prox_l2(z, y, 10.0), physics.prox_l2(z, y, 10.0))
    assert torch.equal(measured(other, y), measured(physics, y))
    index = torch.tensor([1, 0, 1])
    assert torch.equal(select_samples(other, index).A(x[index]), select_samples(physics, index).A(x[index]))
    with pytest.raises(ValueError, match="cannot be changed"):
        other.A(x, img_size=(1, 2, 3))


def test_a_jpeg_encoder_comes_back_the_same():
    codec, x = Jpeg(quality=30).draw(2, (3, 16, 16)), torch.rand(2, 3, 16, 16, generator=generator())
    assert torch.equal(restored(codec).A(x), codec.A(x))


def test_families_come_back_the_same():
    """As part of a data set, say: what they draw from the same stream is the same."""
    mixture = Mixture([RandomGaussianBlur(), SuperResolution(2), MissingStrokes()])
    tomography = DeepinvOperator("Tomography", {"angles": 6, "normalize": True})
    x = torch.rand(4, 1, 32, 32, generator=generator())
    for family in (mixture, tomography, MotionBlur(5), GaussianBlur(1.0)):
        family.draw(4, (1, 32, 32), generator(1))  # some keep what they made
        expected = family.draw(4, (1, 32, 32), generator(2)).A(x)
        assert torch.equal(restored(family).draw(4, (1, 32, 32), generator(2)).A(x), expected)


def test_observations_with_operators_of_deepinv():
    mask = (torch.rand(2, 1, 8, 8, generator=generator()) > 0.5).float()
    physics = dp.Inpainting((3, 8, 8), mask=mask, rng=generator(), noise_model=dp.GaussianNoise(0.1))
    x = torch.rand(2, 3, 8, 8, generator=generator(1))
    observation = Observation.of(physics.A(x), physics, 0.1)
    other = restored(observation)
    assert torch.equal(other.rows(torch.tensor([1])).physics.A(x[1:]), mask[1:] * x[1:])
    assert isinstance(physics.noise_model, dp.GaussianNoise)  # the user's own is as it was
    assert physics.noise_model(x).shape == x.shape


def blurred(physics, x, results):
    torch.set_num_threads(1)
    results.put(physics.A(x).tolist())


@pytest.mark.slow
def test_a_spawned_worker_gets_the_operator():
    context = multiprocessing.get_context("spawn")
    physics, shape = CASES["motion blur"]()
    x = torch.rand(BATCH, *shape, generator=generator())
    results = context.Queue()
    worker = context.Process(target=blurred, args=(physics, x, results))
    worker.start()
    found = torch.tensor(results.get(timeout=120))
    worker.join()
    assert torch.equal(found, physics.A(x))
    buffer = io.BytesIO()
    torch.save(physics, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).A(x), physics.A(x))
