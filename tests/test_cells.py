"""Cells of an evaluation, and what a method uses."""

import json
import time
from io import StringIO

import pytest
import torch
from tiny import adapted, tiny_network, tiny_prior
from torch import nn

from ud2m.bars import Forecast, NetworkEvaluations, progress_bar
from ud2m.evaluation.cells import CellStore, Result, digest, images_digest
from ud2m.evaluation.measure import measure
from ud2m.evaluation.scores import build_score
from ud2m.evaluation.usage import Stopwatch, peak_memory, reset_peak_memory
from ud2m.physics import Denoising, GaussianBlur, Inpainting
from ud2m.physics.problem import Problem
from ud2m.samplers.base import Sampler
from ud2m.samplers.latino import PseudoInverse
from ud2m.samplers.ud2m import PosteriorSampler, SamplerConfig

SETTINGS = {"method": {"num_steps": 3}, "seed": 0}


def images(count=5):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def tiny_sampler(num_blocks):
    prior = adapted(tiny_prior())
    return PosteriorSampler(tiny_network(prior, num_blocks), SamplerConfig(num_steps=2, chunk_size=4))


def test_evaluations_are_counted_and_not_believed():
    method = tiny_sampler(num_blocks=3)
    row = measure(method, Problem(GaussianBlur(), 0.05), images().split([3, 2]), [], 2).row
    assert (row["nfe"], row["images"], row["samples"]) == (6, 5, 2)
    # a network that is called once more than it says is found out
    block = method.network.blocks[0]
    forward = block.forward
    block.forward = lambda x, *rest: forward(method.networks[0](x, torch.full((len(x),), 0.1)), *rest)
    assert measure(method, Problem(GaussianBlur(), 0.05), images().split([3, 2]), [], 2).row["nfe"] == 8
    assert measure(PseudoInverse(), Problem(GaussianBlur(), 0.05), [images()], [], 1).row["nfe"] == 0


def test_hooks_are_gone_afterwards_also_after_an_error():
    network = nn.Identity()
    with NetworkEvaluations([network]) as counter:
        network(torch.zeros(3, 1))
        network(torch.zeros(4, 1))
    network(torch.zeros(9, 1))
    assert counter.count == 7
    with pytest.raises(ZeroDivisionError), NetworkEvaluations([network]):
        _ = 1 / 0
    assert not network._forward_hooks


def test_peak_memory_sees_a_tensor_that_is_gone():
    reset_peak_memory()
    before = peak_memory()
    if before is None:
        pytest.skip("this system does not tell the peak of its memory")
    big = torch.ones(40 * 2**20 // 4 * 4)  # 160 MB
    del big
    assert peak_memory() - before > 100
    reset_peak_memory()
    assert peak_memory() - before < 100


def test_a_stopwatch_adds_up_and_waits_for_the_device(monkeypatch):
    waited = []
    monkeypatch.setattr("torch.cuda.synchronize", waited.append)
    watch, begin = Stopwatch("cuda"), time.perf_counter()
    for _ in range(2):
        with watch:
            time.sleep(0.05)
        time.sleep(0.05)
    assert 0.1 <= watch.seconds <= time.perf_counter() - begin - 0.1
    assert waited == 4 * [torch.device("cuda")]  # before and after each


def told(done):
    """A forecast that notes the samples that are drawn."""
    forecast = Forecast(progress_bar(disable=True), 0)
    forecast.drawn = done.append
    return forecast


class Counting(Sampler):
    """As many evaluations of a network as an image has been asked for."""

    def __init__(self, evaluations):
        super().__init__([nn.Identity()])
        self.asked = evaluations

    def draw(self, observation, streams):
        for _ in range(self.asked):
            self.networks[0](observation.y)
        return observation.y


def test_the_bar_of_a_measurement_counts_network_evaluations():
    with progress_bar(file=StringIO()) as bar:
        forecast, seen = Forecast(bar, 5 * 2 + 5 * 2), []
        for evaluations in (4, 6):
            batches = (seen.append((bar.n, bar.total)) or x0 for x0 in images().split([3, 2]))
            measure(Counting(evaluations), Problem(Denoising(), 0.05), batches, [], 2, forecast=forecast)
    # after 6 samples of 4 evaluations: 20 would take 80; after 10 of 4 and 6 of 6: (40 + 36) / 16 * 20
    assert seen == [(0, None), (24, 80), (40, 80), (76, 95)]
    assert (bar.n, bar.total) == (100, 100)


def test_every_method_sees_the_same_observations_and_the_shown_pictures_are_kept():
    seen = []

    class Spy(PseudoInverse):
        def draw(self, observation, streams):
            seen.append((observation.y, observation.physics.mask))
            return super().draw(observation, streams)

    problem, x0 = Problem(Inpainting(), 0.05), images()
    done = []
    for sizes in ([5], [2, 3]):
        result = measure(Spy(), problem, x0.split(sizes), [build_score("psnr")], 1, {0, 3}, told(done))
    assert done == [5, 2, 3]
    torch.testing.assert_close(torch.cat([y for y, _ in seen[1:]]), seen[0][0], rtol=0, atol=1e-6)
    assert torch.equal(torch.cat([mask for _, mask in seen[1:]]), seen[0][1])
    assert set(result.pictures) == {0, 3}
    assert torch.equal(result.pictures[3]["x0"], x0[3])
    torch.testing.assert_close(result.pictures[3]["y"], seen[0][0][3], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="no images"):
        measure(Spy(), problem, [], [], 1)


def test_a_cell_comes_back_as_it_was_kept(tmp_path):
    store = CellStore(tmp_path / "cells")
    assert store.load(SETTINGS) is None
    pictures = {2: {"x0": images()[0], "mean": images()[1]}, 10: {"x0": images()[2]}}
    store.save(SETTINGS, Result({"psnr": 30.5, "nfe": 9}, {"ranks": [[1, 2]]}, pictures))
    found = store.load(SETTINGS)
    assert (found.row, found.curves) == ({"psnr": 30.5, "nfe": 9}, {"ranks": [[1, 2]]})
    assert list(found.pictures) == [2, 10]
    torch.testing.assert_close(found.pictures[2]["mean"], images()[1], atol=1e-3, rtol=0)


def test_other_settings_are_another_cell(tmp_path):
    store = CellStore(tmp_path)
    store.save(SETTINGS, Result({}, {}, {}))
    assert store.load(SETTINGS | {"seed": 1}) is None
    assert store.load({"method": {"num_steps": 4}, "seed": 0}) is None
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    assert images_digest(images().split([3, 2])) == images_digest([images()]) != images_digest([images() + 1e-3])


def test_damaged_and_foreign_cells_are_refused(tmp_path):
    store = CellStore(tmp_path)
    store.save(SETTINGS, Result({}, {}, {}))
    path = tmp_path / f"{digest(SETTINGS)}.json"
    content = path.read_text()
    path.write_text(content[:20])
    with pytest.raises(ValueError, match=r"damaged .* delete this file"):
        store.load(SETTINGS)
    path.write_text(json.dumps(json.loads(content) | {"settings": {"seed": 7}}))
    with pytest.raises(ValueError, match="made with other settings"):
        store.load(SETTINGS)
    path.write_text(content)
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(ValueError, match="damaged"):
        store.load(SETTINGS)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"damaged|does not hold"):
        store.load(SETTINGS)
