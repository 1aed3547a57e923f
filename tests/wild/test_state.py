"""A call leaves nothing behind, and calls in other threads do not meet it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from tiny import LORA, SIZE, adapted, tiny_prior, trained

from ud2m.physics import Inpainting
from ud2m.priors.gaussian_mixture import GaussianMixture
from ud2m.priors.prior import LoraSpec
from ud2m.random import global_draws
from ud2m.samplers.deepinv import DiffPir

SIGMA = torch.tensor([0.05, 0.2, 0.5])


def images(count=3, seed=0):
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def state(prior):
    layers = [module for module in prior.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]
    switches = [(layer.disable_adapters, layer.merged) for layer in layers if hasattr(layer, "merged")]
    needed = {name: p.requires_grad for name, p in prior.named_parameters()}
    return switches, needed, [module.training for module in prior.modules()], torch.is_autocast_enabled("cpu")


def merged():
    return adapted(tiny_prior()).merge_adapter()


def unmerged():
    return adapted(tiny_prior())


@pytest.mark.parametrize("make", [merged, unmerged])
def test_features_are_the_frozen_priors_and_leave_the_adapter_as_it_was(make):
    prior, x = make(), images()
    before, expected = state(prior), prior(x, SIGMA)
    features = prior.features(x)
    for feature, own in zip(features, tiny_prior().features(x), strict=True):
        torch.testing.assert_close(feature, own, rtol=1e-4, atol=1e-4 * own.abs().max().item())
    with pytest.raises(RuntimeError):
        prior.features(x[:, :1])
    assert state(prior) == before
    assert torch.equal(prior(x, SIGMA), expected)


@pytest.mark.parametrize("make", [merged, unmerged])
@pytest.mark.slow
def test_features_in_another_thread_do_not_reach_what_is_drawn(make):
    prior, x = make(), images(1)
    expected = prior(x, SIGMA[:1])
    stop = threading.Event()

    def look():
        while not stop.is_set():
            prior.features(x)

    with ThreadPoolExecutor(1) as other:
        looking = other.submit(look)
        try:
            found = [prior(x, SIGMA[:1]) for _ in range(60)]
        finally:
            stop.set()
        looking.result()
    assert all(torch.equal(one, expected) for one in found)


def test_the_frozen_network_follows_training_moving_and_merging():
    prior = tiny_prior().add_lora(LoraSpec(**LORA))
    x = images()
    expected = tiny_prior().double()(x.double(), SIGMA.double())
    shared = {p.data_ptr() for p in prior.unet.parameters()}
    assert {p.data_ptr() for p in prior.frozen_network().parameters()} <= shared  # no memory of its own
    prior.double()
    assert torch.equal(prior.frozen(x.double(), SIGMA.double()), expected)
    with torch.no_grad():
        for parameter in trained(prior).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert torch.equal(prior.frozen(x.double(), SIGMA.double()), expected)
    prior.merge_adapter()
    torch.testing.assert_close(prior.frozen(x.double(), SIGMA.double()), expected, rtol=0, atol=1e-10)


# --- torch's global random numbers, which samplers of deepinv draw from ----------------------------------------------


def test_samplers_of_deepinv_in_threads_draw_what_they_draw_alone():
    white = GaussianMixture(torch.ones(1), torch.full((1, 3, 6, 6), 0.5), 0.04 * torch.eye(108)[None])
    sampler = DiffPir(white, num_steps=6)
    physics = Inpainting(0.5).draw(1, (3, 6, 6), torch.Generator().manual_seed(0))
    y = physics.A(torch.rand(1, 3, 6, 6))

    def drawn(seed):
        return sampler(y, physics, 0.05, 2, torch.Generator().manual_seed(seed))

    alone = [drawn(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(drawn, range(8)))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_global_generators_are_as_before_also_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="negative"), global_draws(3):
        torch.rand(5 - torch.rand(5).numel() - 1)
    assert torch.equal(torch.get_rng_state(), before)
