import itertools

import pytest
import torch
from diffusers import DDIMScheduler
from operators import generator
from tiny import SCHEDULER

import ud2m.unfolded.ddim
from ud2m.physics import Denoising, Observation, SuperResolution, observe
from ud2m.priors.schedule import VPSchedule, abar
from ud2m.random import randn_like
from ud2m.unfolded.ddim import FRESH, check_eta, ddim_step, sample_posterior, step_deviation

SCHEDULE = VPSchedule.from_config(SCHEDULER)
ETAS = [0, 0.5, 1, FRESH]
each_eta = pytest.mark.parametrize("eta", ETAS)
each_count = pytest.mark.parametrize("num_steps", [1, 2, 4])
SHAPE, DIMENSION = (1, 4, 4), 16


# --- exact posterior samples of a Gaussian -------------------------------------------------------------------


class GaussianPosterior:
    """A network that draws from p(x0 | x_sigma, y) exactly, for x0 ~ N(mean, covariance) and y = A x0 + sigma_y w."""

    def __init__(self):
        root = torch.randn(DIMENSION, DIMENSION, generator=generator(1), dtype=torch.float64)
        self.mean = torch.linspace(0.3, 0.7, DIMENSION, dtype=torch.float64)
        self.covariance = 0.25**2 * (root @ root.T / DIMENSION + 0.2 * torch.eye(DIMENSION))
        self.physics = SuperResolution(2, "box").draw(1, SHAPE)
        basis = torch.eye(DIMENSION, dtype=torch.float64).view(-1, *SHAPE)
        self.A = self.physics.A(basis).flatten(1).T
        self.sigma_y = 0.05
        x0 = self.mean + torch.linalg.cholesky(self.covariance) @ torch.randn(
            DIMENSION, generator=generator(2), dtype=torch.float64
        )
        self.y = observe(self.physics, x0.view(1, *SHAPE), self.sigma_y, generator(3))

    def moments(self, x_sigma=None, sigma=float("inf")):
        """Return mean and covariance of p(x0 | x_sigma, y); without x_sigma, of p(x0 | y)."""
        prior = torch.linalg.inv(self.covariance)
        precision = prior + self.A.T @ self.A / self.sigma_y**2 + torch.eye(DIMENSION) / sigma**2
        right = prior @ self.mean + self.A.T @ self.y.flatten() / self.sigma_y**2
        if x_sigma is not None:
            right = right + x_sigma.flatten(1) / sigma**2
        covariance = torch.linalg.inv(precision)
        return right @ covariance, covariance

    def __call__(self, x_sigma, sigma, observation, generator=None):
        mean, covariance = self.moments(x_sigma, sigma[0])
        noise = randn_like(mean, generator)
        return (mean + noise @ torch.linalg.cholesky(covariance).T).view_as(x_sigma)

    def samples(self, count, levels, eta):
        y = self.y.expand(count, *self.y.shape[1:])
        observation = Observation.of(y, self.physics, self.sigma_y)
        return sample_posterior(self, observation, levels, eta, generator(9)).flatten(1)


def largest_deviation(samples, mean, covariance):
    """Return the largest error of the samples' mean and covariance, in standard errors."""
    count = len(samples)
    of_mean = (samples.mean(0) - mean) / (covariance.diag() / count).sqrt()
    standard_error = ((covariance**2 + torch.outer(covariance.diag(), covariance.diag())) / count).sqrt()
    of_covariance = (samples.T.cov() - covariance) / standard_error
    return max(of_mean.abs().max().item(), of_covariance.abs().max().item())


POSTERIOR = GaussianPosterior()
COUNT = 80_000


@each_eta
@each_count
def test_an_exact_network_gives_exact_posterior_samples(eta, num_steps):
    samples = POSTERIOR.samples(COUNT, SCHEDULE.grid(num_steps), eta)
    assert largest_deviation(samples, *POSTERIOR.moments()) < 4.5


def test_the_problem_is_neither_solved_by_the_observation_nor_by_the_prior():
    _, posterior = POSTERIOR.moments()
    uncertain = posterior.diag().sqrt()
    assert uncertain.min() > 2 * POSTERIOR.sigma_y
    assert uncertain.square().sum() < 0.7 * POSTERIOR.covariance.diag().sum()
    assert (posterior / torch.outer(uncertain, uncertain)).tril(-1).min() < -0.5  # strongly correlated


def too_noisy(x, x0_hat, sigma, sigma_next, eta, generator=None):
    s = step_deviation(sigma, sigma_next, eta)
    return x0_hat + sigma_next * (x - x0_hat) / sigma + s * randn_like(x, generator)


def too_clean(x, x0_hat, sigma, sigma_next, eta, generator=None):
    s = step_deviation(sigma, sigma_next, eta)
    return x0_hat + (sigma_next**2 - s**2).sqrt() * (x - x0_hat) / sigma


@pytest.mark.parametrize("wrong", [too_noisy, too_clean])
@pytest.mark.parametrize("eta", [0.5, 1, FRESH])
@pytest.mark.parametrize("num_steps", [2, 4])
def test_a_wrong_step_variance_is_noticed(monkeypatch, wrong, eta, num_steps):
    """So the test above can fail."""
    monkeypatch.setattr(ud2m.unfolded.ddim, "ddim_step", wrong)
    samples = POSTERIOR.samples(COUNT, SCHEDULE.grid(num_steps), eta)
    assert largest_deviation(samples, *POSTERIOR.moments()) > 6


# --- one step ------------------------------------------------------------------------------------------------


@each_eta
def test_every_step_arrives_at_the_marginal_of_its_level(eta):
    """x0 ~ N(m, v): after each step x ~ N(m, v + sigma^2), with noise of deviation sigma independent of x0_hat."""
    count, mean, deviation = 400_000, 0.6, 0.2
    random = generator(4)

    def normal():
        return torch.randn(count, generator=random, dtype=torch.float64)

    levels = SCHEDULE.grid(5).double()
    x = mean + deviation * normal() + levels[0] * normal()
    for sigma, sigma_next in itertools.pairwise(levels):
        weight = deviation**2 / (deviation**2 + sigma**2)
        x0_hat = mean + weight * (x - mean) + (weight * sigma**2).sqrt() * normal()
        x = ddim_step(x, x0_hat, sigma, sigma_next, eta, random)
        total = (deviation**2 + sigma_next**2).sqrt()
        bound = 4.5 / (2 * count) ** 0.5
        assert (x.std() / total - 1).abs() < bound
        assert ((x - x0_hat).std() / sigma_next - 1).abs() < bound
        assert (x.mean() - mean).abs() < 4.5 * total / count**0.5
        assert torch.stack([x - x0_hat, x0_hat]).corrcoef()[0, 1].abs() < 4.5 / count**0.5


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("time", "steps"), [(999, 3), (500, 4), (100, 10)])
def test_step_is_that_of_the_ddim_scheduler(eta, time, steps):
    """In variance-preserving coordinates, for x0 in [-1, 1]; diffusers' grid steps down by T // steps."""
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    t, t_next = torch.tensor([time, max(time - 1000 // steps, 0)]).double().unbind()
    sigma, sigma_next = SCHEDULE.sigma(t), SCHEDULE.sigma(t_next)
    x0_hat, direction = torch.rand(2, 1, 4, 4, generator=generator(5), dtype=torch.float64)
    x = x0_hat + sigma * direction
    noise = randn_like(x, generator(6))

    x_t = abar(sigma).sqrt() * (2 * x - 1)
    theirs = scheduler.step(direction, time, x_t, eta=eta, variance_noise=noise)
    torch.testing.assert_close((theirs.pred_original_sample + 1) / 2, x0_hat, rtol=0, atol=2e-3)
    expected = (theirs.prev_sample / abar(sigma_next).sqrt() + 1) / 2
    ours = ddim_step(x, x0_hat, sigma, sigma_next, eta, generator(6))
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-3 * max(1, sigma_next.item()))


def test_deviations_of_the_modes():
    sigma, sigma_next = torch.tensor(2.0), torch.tensor(1.2)
    assert step_deviation(sigma, sigma_next, 0) == 0
    assert step_deviation(sigma, sigma_next, 1) == pytest.approx(1.2 * 0.8)
    assert step_deviation(sigma, sigma_next, 0.5) == pytest.approx(0.6 * 0.8)
    assert step_deviation(sigma, sigma_next, FRESH) == 1.2


def test_eta_zero_is_deterministic_and_fresh_forgets_the_past():
    x, x0_hat = torch.rand(2, 3, 1, 2, 2, generator=generator())
    sigma, sigma_next = torch.tensor(0.8), torch.tensor(0.3)
    steps = [ddim_step(x, x0_hat, sigma, sigma_next, 0, generator(seed)) for seed in (1, 2)]
    assert torch.equal(*steps)
    torch.testing.assert_close(steps[0], x0_hat + 0.3 / 0.8 * (x - x0_hat))
    steps = [ddim_step(start, x0_hat, sigma, sigma_next, FRESH, generator(1)) for start in (x, x + 1)]
    assert torch.equal(*steps)


# --- the walk ------------------------------------------------------------------------------------------------


class Recorder:
    """A network that keeps its inputs and answers grey."""

    def __init__(self):
        self.calls = []

    def __call__(self, *arguments):
        self.calls.append(arguments)
        return torch.full_like(arguments[0], 0.5)


def walk(levels, eta=1.0, random=None, batch=2):
    network = Recorder()
    physics = Denoising().draw(batch, (3, 4, 6))
    observation = Observation(torch.rand(batch, 3, 4, 6), physics, torch.linspace(0.1, 0.2, batch))
    x = sample_posterior(network, observation, torch.tensor(levels), eta, random)
    return x, network.calls, observation


def test_network_is_called_once_per_level_with_what_it_needs():
    levels = [5.0, 1.0, 0.2]
    x, calls, observation = walk(levels, random=generator())
    assert len(calls) == 3
    for level, (x_sigma, sigma, given, _) in zip(levels, calls, strict=True):
        assert x_sigma.shape == (2, 3, 4, 6)
        assert sigma.tolist() == pytest.approx([level, level])
        assert given is observation
    assert torch.equal(x, torch.full((2, 3, 4, 6), 0.5))  # the last answer, no noise on it


def test_the_walk_starts_from_noise_of_the_largest_level():
    _, calls, *_ = walk([5.0], random=generator(), batch=2000)
    x = calls[0][0]
    assert abs(x.mean()) < 4.5 * 5 / x.numel() ** 0.5
    assert abs(x.std() / 5 - 1) < 4.5 / (2 * x.numel()) ** 0.5


@each_eta
def test_the_walk_takes_the_steps_of_its_eta(eta):
    _, calls, *_ = walk([5.0, 1.0, 0.2], eta, generator(3))
    x, *visited = (call[0] for call in calls)
    noise = generator(3)
    assert torch.equal(x, 5 * torch.randn(x.shape, generator=noise))
    for sigma, sigma_next, arrived in ((5.0, 1.0, visited[0]), (1.0, 0.2, visited[1])):
        s = sigma_next if eta == FRESH else eta * sigma_next * (1 - (sigma_next / sigma) ** 2) ** 0.5
        kept = (sigma_next**2 - s**2) ** 0.5 / sigma
        x = 0.5 + kept * (x - 0.5) + s * torch.randn(x.shape, generator=noise)
        torch.testing.assert_close(arrived, x)


@each_eta
def test_a_row_depends_on_its_own_generator_alone(eta):
    def inputs(*seeds):
        return [call[0] for call in walk([5.0, 1.0, 0.2], eta, [generator(s) for s in seeds], len(seeds))[1]]

    for together, first, second in zip(inputs(1, 2), inputs(1), inputs(2), strict=True):
        assert torch.equal(together, torch.cat([first, second]))
        assert not torch.equal(first, second)


@pytest.mark.parametrize("levels", [[], [[1.0, 0.5]], [0.5, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, -1.0], [float("nan")]])
def test_levels_that_do_not_fall_are_refused(levels):
    with pytest.raises(ValueError, match="levels must be positive and strictly falling"):
        walk(levels)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), "none", None, [1.0]])
def test_other_values_of_eta_are_refused(eta):
    with pytest.raises(ValueError, match=r'eta must be a number in \[0, 1\] or "fresh", got'):
        check_eta(eta)
    with pytest.raises(ValueError, match="eta must be"):
        walk([1.0], eta)
