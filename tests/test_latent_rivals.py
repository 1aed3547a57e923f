"""LDPS, PSLD, P2L and TReg: their limits are one another, and diffusers' DDIM."""

import pytest
import tiny_latent
import torch
from diffusers import DDIMScheduler
from test_latent_latino import observed, streams

from ud2m.bars import NetworkEvaluations
from ud2m.priors.latent import LatentPrior
from ud2m.samplers.latent_rivals import Ldps, P2l, Psld, Treg

STEPS = 10


@pytest.fixture(scope="module")
def prior():
    return LatentPrior(tiny_latent.pipeline("sd_v"))


@torch.no_grad()
def test_psld_without_glue_is_ldps_to_the_last_bit(prior):
    observation = observed()
    ldps = Ldps(prior, "a", STEPS).draw(observation, streams())
    assert torch.equal(Psld(prior, "a", STEPS, glue=0.0).draw(observation, streams()), ldps)
    assert not torch.equal(Psld(prior, "a", STEPS, glue=0.1).draw(observation, streams()), ldps)


@pytest.mark.slow
@torch.no_grad()
def test_p2l_that_moves_nothing_is_ldps_with_its_data_steps(prior):
    observation = observed()
    ldps = Ldps(prior, "a", STEPS).draw(observation, streams())
    assert torch.equal(P2l(prior, "a", STEPS, rate=0.0, every=STEPS + 1).draw(observation, streams()), ldps)

    class Resampled(Ldps):
        def estimated(self, z, z0, k, observation):
            if k % 4 != 3:
                return z0
            x = self.prior.decode(z0)
            return self.prior.encode(observation.physics.prox_l2(x, observation.y, 1.0))

    expected = Resampled(prior, "a", STEPS).draw(observation, streams())
    assert torch.equal(P2l(prior, "a", STEPS, rate=0.0, every=4).draw(observation, streams()), expected)
    assert not torch.equal(P2l(prior, "a", STEPS, rate=0.1, every=4).draw(observation, streams()), expected)


@torch.no_grad()
def test_treg_without_data_is_ddim(prior):
    observation = observed()
    sampler = Treg(prior, "a", STEPS, guidance=1.0, gamma=0.0)
    z = torch.stack([torch.randn(4, 8, 8, generator=g) for g in streams()])
    scheduler = DDIMScheduler(
        **tiny_latent.TABLE, prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(STEPS)
    assert scheduler.timesteps.tolist() == sampler.times[:-1]
    scheduler.final_alpha_cumprod = torch.tensor(1.0)
    embeds = prior.encode_prompt("a").embeds.expand(2, -1, -1)
    for t in scheduler.timesteps:
        z = scheduler.step(prior.network(z, t, encoder_hidden_states=embeds).sample, t, z).prev_sample
    torch.testing.assert_close(sampler.draw(observation, streams()), prior.decode(z), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_tregs_guidance_leads_away_from_its_null_prompt(prior):
    """With G linear in what the network says: G_null + w (G - G_null), here by direct calls of the network."""
    observation, weight = observed(), 3.0
    z = torch.stack([torch.randn(4, 8, 8, generator=g) for g in streams()])
    embeds = {text: prior.encode_prompt(text).embeds.expand(2, -1, -1) for text in ("a", "blur", "")}
    plain = Treg(prior, "a", STEPS, gamma=0.0, guidance=weight)
    sampler = Treg(prior, "a", STEPS, gamma=0.0, guidance=weight, null_prompt="blur")
    for t, t_next in zip(sampler.times, sampler.times[1:], strict=False):
        said = {text: prior.network(z, t, encoder_hidden_states=states).sample for text, states in embeds.items()}
        v = said["blur"] + weight * (said["a"] - said["blur"])
        (a, b), (a_next, b_next) = sampler.roots(t), sampler.roots(t_next)
        z = a_next * (a * z - b * v) + b_next * (b * z + a * v)
    found = sampler.draw(observation, streams())
    torch.testing.assert_close(found, prior.decode(z), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain.draw(observation, streams()), found, atol=1e-3)
    # without guidance no prompt is left to lead away from
    one = [Treg(prior, "a", STEPS, 1.0, 0.0, null_prompt=text).draw(observation, streams()) for text in ("", "blur")]
    assert torch.equal(*one)


@torch.no_grad()
def test_tregs_data_step_keeps_the_variance_of_the_noise(prior):
    """(1 - abar')^2 + abar' (1 - abar') = 1 - abar'."""
    a, b = Treg(prior, "a", STEPS).roots(499)
    assert abs(b**4 + (a * b) ** 2 - b**2) < 1e-9


@pytest.mark.parametrize(("kind", "count"), [(Ldps, STEPS), (Psld, STEPS), (P2l, 2 * STEPS), (Treg, 2 * STEPS)])
@pytest.mark.slow
def test_evaluations_and_batches(prior, kind, count):
    observation = observed()
    with NetworkEvaluations([prior.network]) as counter:
        samples = kind(prior, "a", STEPS).sample(observation, 1, torch.Generator().manual_seed(0))
    assert counter.count == 2 * count
    alone = kind(prior, "a", STEPS, chunk_size=1).sample(observation, 1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(alone, samples, rtol=1e-3, atol=1e-3)


def test_guidance_of_a_model_that_has_it_inside_is_refused():
    distilled = LatentPrior(tiny_latent.pipeline("distilled"))
    for make in (lambda: Treg(distilled, "a", STEPS), lambda: Ldps(distilled, "a", STEPS, guidance=2.0)):
        with pytest.raises(ValueError, match="distilled into it"):
            make()
    Ldps(distilled, "a", STEPS)


def test_numbers_out_of_range_are_refused(prior):
    for make in (
        lambda: Ldps(prior, "a", 1001),
        lambda: Ldps(prior, "a", weight=0.0),
        lambda: Psld(prior, "a", glue=-1.0),
        lambda: P2l(prior, "a", rate=-1.0),
        lambda: Treg(prior, "a", share=1.5),
    ):
        with pytest.raises(ValueError, match=r"must|needs"):
            make()
