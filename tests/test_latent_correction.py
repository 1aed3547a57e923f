"""Noisy latents corrected by y, against posteriors known by dense algebra and against finite differences."""

import pytest
import tiny_latent
import torch
from latent_priors import NUMBERS, WIDTH, GaussianLatentPrior, onto_y

from ud2m.bars import NetworkEvaluations
from ud2m.physics import Problem, SuperResolution
from ud2m.priors.latent import LatentPrior, Prompt
from ud2m.samplers import latino_pro
from ud2m.samplers.latent_latino import AnnealedSteps, Correction, LatentLatino, StepRule
from ud2m.samplers.latino_pro import LatinoPro, PromptOptimizer
from ud2m.samplers.latino_scores import LatinoScores

SIGMA, PROMPT = 0.02, Prompt(torch.zeros(1, 1, WIDTH))


class ExactSteps(StepRule):
    """delta = Var(x | z_t) of a prior N(0, v) with one v for all latents, for images 0.5 + 0.05 Q z."""

    def variance(self, prior, t, u, observation):
        a, b = (float(root) for root in prior.table.roots(torch.tensor([t])))
        v = prior.v[0].item()
        return u.new_full((len(u),), 0.05**2 * v * b**2 / (a**2 * v + b**2))


def observed(prior):
    """Return an observation of a draw from N(0, diag(v)), and A D without its constant, with y less the constant."""
    noise = torch.randn(1, NUMBERS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    observation = Problem(SuperResolution(2, "box"), SIGMA, 0).observe(prior.decode(prior.v.sqrt() * noise))
    return observation, *onto_y(prior, observation)


def gaussian_problem():
    """Return a prior N(0, 0.4), and ``observed``."""
    prior = GaussianLatentPrior()
    prior.v = torch.full_like(prior.v, 0.4)
    return prior, *observed(prior)


def posterior(mean, variance, H, offset):
    """Return the mean of z given y = H z + n, for z ~ N(mean, variance)."""
    innovation = variance * H @ H.T + SIGMA**2 * torch.eye(len(H))
    return mean + variance * H.T @ torch.linalg.solve(innovation, offset - H @ mean)


@pytest.mark.parametrize("t", [999, 374, 60])
def test_one_correction_gives_the_mean_of_the_latents_given_the_noisy_ones_and_y(t):
    prior, observation, H, offset = gaussian_problem()
    a, b = (float(root) for root in prior.table.roots(torch.tensor([t])))
    z_t = torch.randn(1, NUMBERS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        found = Correction(1).estimate(prior, z_t, t, PROMPT, ExactSteps(), observation)
        mean = prior.estimate(z_t, t, PROMPT)[0]
    dense = posterior(mean, 0.4 * b**2 / (a**2 * 0.4 + b**2), H, offset)
    torch.testing.assert_close(found[0], dense, rtol=1e-5, atol=1e-6)
    assert (mean - dense).norm() > 0.05 * dense.norm()


def test_the_step_is_the_gradient_of_the_likelihood_by_finite_differences():
    prior, steps, t, width = LatentPrior(tiny_latent.pipeline("sd")), AnnealedSteps(1.0), 400, 16
    observation = Problem(SuperResolution(2, "box"), 0.05).observe(torch.rand(1, 3, width, width))
    prompt, generator = prior.prompt("a cat"), torch.Generator().manual_seed(2)
    z_t = torch.randn(1, *prior.latent_shape((width, width)), generator=generator)
    a, b = (float(root) for root in prior.table.roots(torch.tensor([t])))

    @torch.no_grad()
    def density(z_t):
        # A A^T = 1 / 4 for means of 4 pixels: log N(y; A u, (sigma_y^2 + delta / 4) 1)
        u = prior.decode(prior.estimate(z_t, t, prompt))
        misfit = (observation.physics.A(u) - observation.y).double().square().sum()
        return -misfit / (2 * (0.05**2 + float(steps.variance(prior, t, u, observation)) / 4))

    with torch.no_grad():
        moved = Correction(1, rate=0.3).estimate(prior, z_t, t, prompt, steps, observation)
        gradient = (moved - prior.estimate(z_t, t, prompt)) * a / (0.3 * b**2)
    for _ in range(3):
        along = torch.randn(z_t.shape, generator=generator) + gradient / gradient.norm()
        slope = (density(z_t + 0.01 * along) - density(z_t - 0.01 * along)) / 0.02
        expected, close = (gradient * along).sum().item(), 0.02 * gradient.norm().item()
        assert slope.item() == pytest.approx(expected, rel=0.02, abs=close)


def test_more_evaluations_climb_the_likelihood_of_the_noisy_latents():
    """G(z_t) = g z_t here, so that the climb of z_t is a recursion of matrices."""
    prior, observation, H, offset = gaussian_problem()
    first = torch.randn(1, NUMBERS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, b = (float(root) for root in prior.table.roots(torch.tensor([374])))
    g, variance = 0.4 * a / (0.4 * a**2 + b**2), 0.4 * b**2 / (0.4 * a**2 + b**2)
    innovation = variance * H @ H.T + SIGMA**2 * torch.eye(len(H))
    z_t, misfits = first[0], []
    for count in range(1, 9):
        step = 0.5 * b**2 * g * H.T @ torch.linalg.solve(innovation, offset - g * H @ z_t)
        with torch.no_grad():
            found = Correction(count, 0.5).estimate(prior, first, 374, PROMPT, ExactSteps(), observation)[0]
        torch.testing.assert_close(found, g * z_t + step / a, rtol=1e-5, atol=1e-6)
        z_t = z_t + step
        misfits.append((H @ found - offset).norm().item())
    assert misfits == sorted(misfits, reverse=True)
    assert misfits[-1] < 0.8 * misfits[0]


def test_corrected_samples_are_nearer_to_the_posterior():
    """Latents vary in a few directions: what y says of one tells of all, which the prox of LATINO does not know."""
    prior, few = GaussianLatentPrior(), 16
    prior.v = torch.where(torch.arange(NUMBERS) < few, 1.0, 0.001).double()
    observation, H, offset = observed(prior)
    V = torch.diag(prior.v)
    exact = V @ H.T @ torch.linalg.solve(H @ V @ H.T + SIGMA**2 * torch.eye(len(H)), offset)

    def error(correction):  # of the mean over many samples, at the width that is best for each
        found = []
        for width in (0.05, 0.1, 0.2):
            sampler = LatentLatino(prior, PROMPT, steps=AnnealedSteps(width), correction=correction, chunk_size=100)
            samples = sampler.sample(observation, 100, torch.Generator().manual_seed(0))[0]
            found.append((prior.encode(samples).mean(0) - exact).norm().item())
        return min(found)

    plain, corrected, twice = (error(correction) for correction in (None, Correction(1), Correction(2, 0.5)))
    assert corrected < 0.75 * plain
    assert twice < 0.75 * plain


def test_samples_do_not_depend_on_their_batch_and_evaluations_are_counted():
    prior = LatentPrior(tiny_latent.pipeline("sd"))
    observation = Problem(SuperResolution(2, "box"), 0.05).observe(torch.rand(2, 3, 16, 16))
    found = []
    for chunk_size in (4, 1):
        sampler = LatentLatino(prior, "a", [999, 499], chunk_size=chunk_size, correction=Correction(3, 0.5))
        with NetworkEvaluations(sampler.networks) as counter:
            found.append(sampler.sample(observation, 2, torch.Generator().manual_seed(1)))
        assert counter.count == 4 * sampler.nfe() == 4 * 6
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert not found[0].requires_grad
    assert all(p.grad is None for p in prior.parameters())


def test_checkpoints_change_nothing_but_memory():
    observation = Problem(SuperResolution(2, "box"), 0.05).observe(torch.rand(1, 3, 16, 16))
    found = []
    for checkpoint in (False, True):
        prior = LatentPrior(tiny_latent.pipeline("sd"))
        sampler = LatentLatino(prior, "a", [499], correction=Correction(2, 0.5, checkpoint))
        assert prior.network.is_gradient_checkpointing == checkpoint
        found.append(sampler.sample(observation, 1, torch.Generator().manual_seed(1)))
    torch.testing.assert_close(*found)


def test_the_chain_that_draws_is_corrected_where_a_prompt_is_estimated():
    prior, observation, _, _ = gaussian_problem()
    correction = Correction(2, 0.5)
    scores = LatinoScores(prior, PROMPT, tuple(map(str, range(10))), pairs=3, correction=correction)
    ascent = LatinoPro(prior, PROMPT, fixed=0, correction=correction)
    for sampler, count in ((scores, 60 + 16), (ascent, 60 + 16)):
        with NetworkEvaluations(sampler.networks) as counter:
            sampler.sample(observation, 1)
        assert counter.count == count
    assert scores.nfe() == 16
    assert ascent.nfe() == 76


# --- the covariance of y, for prompts ----------------------------------------------------------------------------


@pytest.mark.parametrize("t", [999, 374])
def test_jacobians_give_the_covariance_of_y_and_with_it_the_gradient_and_the_posterior_mean(t, monkeypatch):
    monkeypatch.setattr(latino_pro, "RIDGE", 0.0)
    prior = GaussianLatentPrior()
    observation, H, offset = observed(prior)
    a, b = (float(root) for root in prior.table.roots(torch.tensor([t])))
    generator = torch.Generator().manual_seed(1)
    z_t = torch.randn(2, NUMBERS, generator=generator, dtype=torch.float64).requires_grad_()
    c = torch.randn(2, 1, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    z = prior.estimate(z_t, t, Prompt(c))
    twice = observation.rows(torch.tensor([0, 0]))
    values, u = PromptOptimizer("covariance").of_data(prior, t, z_t, z, twice)
    (gradient,) = torch.autograd.grad(values.sum(), c)
    C = torch.diag(prior.v * b**2 / (a**2 * prior.v + b**2))  # of z given z_t, by dense algebra
    covariance = H @ C @ H.T + SIGMA**2 * torch.eye(len(H))
    explained = torch.linalg.solve(covariance, (offset - z.detach() @ H.T).T).T
    torch.testing.assert_close(prior.encode(u.detach()), z.detach() + explained @ H @ C, rtol=1e-5, atol=1e-6)
    onto_c = H @ torch.diag(b**2 / (a**2 * prior.v + b**2)) @ prior.W
    torch.testing.assert_close(gradient[:, 0], explained @ onto_c, rtol=1e-5, atol=1e-6)


def test_so_many_numbers_of_y_are_refused_before_any_evaluation():
    prior = LatentPrior(tiny_latent.pipeline("sd"))
    observation = Problem(SuperResolution(2, "box"), 0.05).observe(torch.rand(1, 3, 32, 32))
    sampler = LatinoPro(prior, "a", PromptOptimizer("covariance"))
    with (
        NetworkEvaluations([prior.network, prior.vae]) as counter,
        pytest.raises(ValueError, match="for each number of y, 256 at most, and y has 768: take gradient=likelihood"),
    ):
        sampler.sample(observation, 1)
    assert counter.count == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluations": -1}, "evaluations, of the network at each time, must be an integer of at least 0, got -1"),
        ({"evaluations": 2.5}, "must be an integer of at least 0, got 2.5"),
        ({"evaluations": True}, "must be an integer of at least 0, got True"),
        ({"evaluations": 1, "rate": 0.0}, "rate must be a positive number, got 0.0"),
        ({"evaluations": 1, "rate": float("nan")}, "rate must be a positive number, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Correction(**options)
