"""LATINO and LATINO-PRO in latent space, against the pixel sampler and a prior with a known answer."""

import math

import pytest
import tiny_latent
import torch
from diffusers.configuration_utils import FrozenDict
from latent_priors import WIDTH, GaussianLatentPrior, onto_y
from torch import nn

from ud2m.bars import NetworkEvaluations
from ud2m.physics import Observation, Problem, SuperResolution
from ud2m.priors.latent import LatentPrior, Prompt
from ud2m.priors.prior import denoise
from ud2m.priors.schedule import VPSchedule
from ud2m.random import randn_like
from ud2m.samplers.latent_latino import PUBLISHED, AnnealedSteps, LatentLatino, PublishedSteps, StepRule
from ud2m.samplers.latino_pro import LatinoPro, PromptOptimizer
from ud2m.samplers.latino_scores import SHRUNK, LatinoScores, LogDensities, PromptWeights
from ud2m.unfolded.prox import joint_prox
from ud2m.unfolded.warm_start import SmoothingStart, start_from_y


class IdentityVae(nn.Module):
    """Latents are the image itself, in [-1, 1]."""

    device, dtype = torch.device("cpu"), torch.float32  # pipelines ask for both

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.config = tiny_latent.vae().config | {"in_channels": 3, "latent_channels": 3, "scaling_factor": 1.0}
        self.config = FrozenDict(self.config)

    def encode(self, x):
        return type("Encoded", (), {"latents": x})

    def decode(self, z):
        return type("Decoded", (), {"sample": z})


def pixel_pipeline() -> LatentPrior:
    pipe = tiny_latent.pipeline("sd")
    torch.manual_seed(0)
    pipe.unet = tiny_latent.unet(in_channels=3, out_channels=3, sample_size=16)
    pipe.vae, pipe.vae_scale_factor = IdentityVae(), 1
    return LatentPrior(pipe)


class LevelSteps(StepRule):
    """delta_k = tau_k^2 of the pixel sampler, tau = b / (2 a)."""

    def variance(self, prior, t, u, observation):
        a, b = prior.table.roots(torch.tensor([t]))
        return u.new_full((len(u),), float((b / a / 2) ** 2))


def observed(seed: int = 0, shape=(3, 16, 16), factor: int = 2, sigma_y: float = 0.05) -> Observation:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(2, *shape, generator=generator) * 0.4 + 0.3
    return Problem(SuperResolution(factor, "box"), sigma_y).observe(x0)


def streams(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(k) for k in range(count)]


@torch.no_grad()
def test_with_an_identity_autoencoder_it_is_the_pixel_sampler():
    prior, observation, times = pixel_pipeline(), observed(), [300, 150, 40]
    embeds = prior.encode_prompt("a cat").embeds
    schedule = VPSchedule.from_config(tiny_latent.TABLE)

    def network(x_t, t):
        return prior.network(x_t, t, encoder_hidden_states=embeds.expand(len(x_t), -1, -1))

    # the pixel sampler's own steps at sigma(t), clipped as here
    x, noise = start_from_y(SmoothingStart(), observation).clamp(0, 1), streams()
    for t in times:
        tau = schedule.sigma(torch.tensor(float(t)))
        level = tau.expand(len(x))
        x = denoise(network, schedule, x + tau * randn_like(x, noise), level).clamp(0, 1)
        x = joint_prox(observation, x, math.inf, float(tau) ** 2, 1.0)(x).clamp(0, 1)
    sampler = LatentLatino(prior, "a cat", times, LevelSteps())
    torch.testing.assert_close(sampler.draw(observation, streams()), x, rtol=1e-3, atol=1e-4)
    assert x.std() > 0.01


@pytest.mark.parametrize("kind", tiny_latent.KINDS)
def test_every_pipeline_samples_alike_in_any_batch(kind):
    prior, observation = LatentPrior(tiny_latent.pipeline(kind)), observed()
    sampler = LatentLatino(prior, "a cat", [999, 499, 249])
    physics, y = observation.physics, observation.y
    samples = sampler(y, physics, 0.05, 2, torch.Generator().manual_seed(3))
    alone = LatentLatino(prior, "a cat", [999, 499, 249], chunk_size=1)
    torch.testing.assert_close(alone(y, physics, 0.05, 2, torch.Generator().manual_seed(3)), samples)
    assert (samples[:, 0] - samples[:, 1]).abs().max() > 1e-3
    # the last step goes back to the data
    assert (physics.A(samples[:, 0]) - y).abs().mean() < 0.1


@torch.no_grad()
def test_the_autoencoded_result_is_the_prox_through_the_autoencoder():
    prior, observation = LatentPrior(tiny_latent.pipeline("sd")), observed()
    results = [
        LatentLatino(prior, "a", [499], final=final).draw(observation, streams()) for final in ("prox", "autoencoded")
    ]
    assert torch.equal(results[1], prior.decode(prior.encode(results[0])))


@torch.no_grad()
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_steps_give_the_prox_of_the_authors(name):
    """Theirs is solved here for images in [-1, 1], by dense matrices."""
    prior, t = LatentPrior(tiny_latent.pipeline("sd")), 250
    observation = observed(shape=(1, 8, 8))
    u = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    early, late, switch, relative = PUBLISHED[name]
    columns = observation.physics.A(torch.eye(64).view(64, 1, 8, 8)).flatten(1).T.double()
    scaled, target = 2 * u.flatten(1).double() - 1, 2 * observation.y.flatten(1).double() - 1
    abar = prior.pipeline.scheduler.alphas_cumprod[t].double()
    sampler = LatentLatino(prior, "a", [t], PublishedSteps(name))
    ours = sampler.back_to_data(u, t, observation)
    for row in range(2):
        r = (columns @ scaled[row] - target[row]).norm() if relative else 1.0
        gamma = (early if t > switch else late) * r * (1 - abar) / (2 * 0.05) ** 2
        system = torch.eye(64) + gamma * columns.T @ columns
        solved = torch.linalg.solve(system, scaled[row] + gamma * columns.T @ target[row])
        torch.testing.assert_close(ours[row].flatten().double(), ((solved + 1) / 2).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_an_operator_of_images_that_the_autoencoder_cannot_take_is_refused_before_any_evaluation():
    prior = LatentPrior(tiny_latent.pipeline("sd"))
    with NetworkEvaluations([prior.network, prior.vae]) as counter:
        for shape, message in (((3, 20, 12), "multiples of 8, got 20x12"), ((1, 16, 16), "3 channels, got 1")):
            with pytest.raises(ValueError, match=message):
                LatentLatino(prior, "a").sample(observed(shape=shape), 1)
    assert counter.count == 0


def test_the_rule_of_steps_is_free_of_size_and_operator():
    prior = LatentPrior(tiny_latent.pipeline("sd"))
    small = AnnealedSteps(0.5).variance(prior, 499, torch.rand(2, 3, 8, 8), observed())
    large = AnnealedSteps(0.5).variance(prior, 499, torch.rand(2, 3, 64, 64), observed(factor=4))
    abar = prior.pipeline.scheduler.alphas_cumprod[499]
    torch.testing.assert_close(small, (0.25 * (1 - abar) / 4).expand(2))
    assert torch.equal(small, large)


# --- LATINO-PRO --------------------------------------------------------------------------------------------------


def gaussian_problem(seed: int, text: str | None = None):
    """Return a prior, an observation, and argmax p(y | c) with the Fisher information, both by dense algebra."""
    prior, generator = GaussianLatentPrior(), torch.Generator().manual_seed(seed)
    c = torch.randn(1, WIDTH, generator=generator, dtype=torch.float64)
    if text is not None:
        c = prior.encode_prompt((text,)).embeds[0].double()
    z = c @ prior.W.T + prior.v.sqrt() * torch.randn(1, 64, generator=generator, dtype=torch.float64)
    observation = Problem(SuperResolution(2, "box"), 0.02, seed).observe(prior.decode(z))
    H, offset = onto_y(prior, observation)
    covariance = H @ torch.diag(prior.v) @ H.T + 0.02**2 * torch.eye(len(H))
    model = H @ prior.W
    fisher = model.T @ torch.linalg.solve(covariance, model)
    best = torch.linalg.solve(fisher, model.T @ torch.linalg.solve(covariance, offset))
    return prior, observation, best, fisher


def distance(prompt: Prompt, best, fisher) -> float:
    """Return how far a prompt is from the maximum of p(y | c), in standard deviations of the Fisher information."""
    offset = prompt.embeds.flatten(1).double() - best
    return torch.einsum("bi,ij,bj->b", offset, fisher, offset).sqrt().mean().item()


@pytest.mark.slow
@torch.no_grad()
def test_the_estimated_prompt_is_the_maximum_of_the_likelihood():
    found = {"start": [], "likelihood": [], "transition": [], "averaged": [], "covariance": []}
    for seed in range(4):
        prior, observation, best, fisher = gaussian_problem(seed)
        first = Prompt(torch.zeros(1, 1, WIDTH))
        found["start"].append(distance(first, best, fisher))
        for gradient in ("likelihood", "transition"):
            sampler = LatinoPro(prior, first, PromptOptimizer(gradient), fixed=0)
            _, prompt, _ = sampler.estimate(observation, streams(1))
            found[gradient].append(distance(prompt, best, fisher))
        for name, gradient in (("averaged", "likelihood"), ("covariance", "covariance")):
            optimizer = PromptOptimizer(gradient, evaluations=1, ascent="averaged")
            _, prompt, _ = LatinoPro(prior, first, optimizer, fixed=0).estimate(observation, streams(1))
            found[name].append(distance(prompt, best, fisher))
    means = {name: sum(values) / len(values) for name, values in found.items()}
    assert means["likelihood"] < 0.1 * means["start"]
    assert means["averaged"] < means["likelihood"] < means["transition"] < means["start"]
    assert means["averaged"] < 0.2
    assert means["covariance"] < 0.1, means


@torch.no_grad()
def test_scores_find_the_prompt_with_the_highest_likelihood():
    candidates, found, exact = tuple(str(k) for k in range(10)), [], []
    sampler = LatinoScores(GaussianLatentPrior(), Prompt(torch.zeros(1, 1, WIDTH)), candidates, pairs=4)
    with NetworkEvaluations(sampler.networks) as counter:
        for seed in range(6):
            prior, observation, best, fisher = gaussian_problem(seed, str(seed))
            # up to a constant log p(y | c) is -(c - best)^T F (c - best) / 2
            offsets = prior.encode_prompt(candidates).embeds.flatten(1).double() - best
            exact.append(torch.einsum("bi,ij,bj->b", offsets, fisher, offsets).argmin().item())
            _, prompt, trace = sampler.estimate(observation, streams(1))
            found.append(trace.weights[-1, 0].argmax().item())
            torch.testing.assert_close(prompt.embeds[0], prior.encode_prompt((str(found[-1]),)).embeds[0])
    assert counter.count == 80  # 8 images of each prompt, once for all observations
    assert exact == list(range(6))
    assert found == exact


@torch.no_grad()
def test_without_given_prompts_the_scores_take_the_captions_of_the_pipeline():
    prior, observation, _, _ = gaussian_problem(0, "3")
    prompt = Prompt(torch.zeros(1, 1, WIDTH), texts=("a start",))
    with pytest.raises(ValueError, match="two at least, got none, and the pipeline brings no captions"):
        LatinoScores(prior, prompt)
    captions = tuple(str(k) for k in range(10))
    prior.captions = ("a start", *captions)
    sampler, given = (LatinoScores(prior, prompt, texts, pairs=3) for texts in ((), captions))
    assert sampler.texts == captions
    with NetworkEvaluations(sampler.networks) as counter:
        samples = sampler.sample(observation, 1, torch.Generator().manual_seed(0))
    assert counter.count == 68  # as many as the paper's
    torch.testing.assert_close(samples, given.sample(observation, 1, torch.Generator().manual_seed(0)))


def test_densities_of_the_scores_are_those_of_a_dense_student_distribution():
    generator = torch.Generator().manual_seed(0)
    measured = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    y, sigma_y, found = torch.randn(2, 4, generator=generator, dtype=torch.float64), torch.tensor(0.3), []
    residuals = measured - measured.mean(1, keepdim=True)
    covariances = [r.T @ r / 5 for r in residuals]
    shared = sum(covariances) / 3
    for draws, own in zip(measured, covariances, strict=True):
        scale = (own + shared) / 2 + (sigma_y.double() ** 2 + SHRUNK * shared.trace() / 4) * torch.eye(4)
        offsets = y - draws.mean(0)
        distances = (offsets * torch.linalg.solve(scale, offsets.T).T).sum(1)
        found.append(-(4 + 3) / 2 * torch.log1p(distances / 3) - torch.logdet(scale) / 2)
    ours, dense = LogDensities(measured, sigma_y.double())(y), torch.stack(found, 1)
    torch.testing.assert_close(ours - ours[:, :1], dense - dense[:, :1])


@pytest.mark.parametrize(("pairs", "size"), [(20, 60), pytest.param(100, 4, marks=pytest.mark.slow)])
def test_weights_of_prompts_are_as_sure_as_they_are_right(pairs, size):
    """Prompts are Gaussians; fresh draws tell how often a weight is right. Few draws in many numbers need tempering."""
    generator = torch.Generator().manual_seed(0)
    count, sigma_y = 5, torch.tensor(0.2, dtype=torch.float64)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    means, roots = normal(count, 1, size) * 1.5 / size**0.5, normal(1, size, size) / size**0.5
    eps = normal(count, pairs, size)
    fitted = PromptWeights(means + torch.cat([eps, -eps], 1) @ roots, sigma_y)
    y = means + normal(count, 500, size) @ roots
    y = (y + sigma_y * normal(*y.shape)).flatten(0, 1)
    truth = torch.arange(count).repeat_interleave(500)

    def excess(weights):
        return (weights.max(1).values.mean() - (weights.argmax(1) == truth).double().mean()).item()

    untempered = fitted.densities(y).softmax(1)
    assert abs(excess(fitted(y))) < 0.05
    assert excess(untempered) > 0.08 if pairs < size else fitted.beta > 0.9


def test_evaluations_are_those_of_the_paper():
    prior, observation, _, _ = gaussian_problem(0)
    for gradient in ("likelihood", "transition"):
        sampler = LatinoPro(prior, Prompt(torch.zeros(1, 1, WIDTH)), PromptOptimizer(gradient), fixed=0)
        with NetworkEvaluations(sampler.networks) as counter:
            sampler.sample(observation, 3)
        assert counter.count == 3 * 68
