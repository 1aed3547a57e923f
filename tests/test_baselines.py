import pytest
import torch
from operators import CASES, dense, generator
from test_prox import dense_prox
from tiny import SIZE, adapted, save_tiny_prior, tiny_network, tiny_prior

import ud2m.evaluation.comparison
from ud2m.evaluation.comparison import compare, sampler_row, search_latino
from ud2m.evaluation.measure import evaluate
from ud2m.physics import CircularBlur, GaussianBlur, Inpainting, OperatorFamily, SuperResolution, observe
from ud2m.physics.problem import Problem
from ud2m.priors.prior import Prior
from ud2m.samplers.latino import Latino, LatinoSetting, WarmStart, latino_settings, pseudo_inverse
from ud2m.samplers.ud2m import PosteriorSampler, SamplerConfig
from ud2m.unfolded.warm_start import PinvStart, SmoothingStart

SHAPE = (3, SIZE, SIZE)
each_family = pytest.mark.parametrize("family", [GaussianBlur(), SuperResolution(), Inpainting()])


def images(batch=2, seed=0):
    return torch.rand(batch, *SHAPE, generator=generator(seed))


def observation(family, batch=2, sigma_y=0.05):
    physics = family.draw(batch, SHAPE, generator(1))
    return observe(physics, images(batch), sigma_y, generator(2)), physics


# --- without a network ---------------------------------------------------------------------------------------


@each_family
def test_pseudo_inverse_is_every_sample(family):
    y, physics = observation(family)
    samples = pseudo_inverse(y, physics, 0.05, num_samples=3)
    assert samples.shape == (2, 3, *SHAPE)
    for sample in samples.unbind(1):
        assert torch.equal(sample, physics.A_dagger(y).clamp(0, 1))


@each_family
@pytest.mark.parametrize("start", [SmoothingStart(scales=(8, 4)), PinvStart()])
def test_warm_start_is_that_of_a_network_that_sees_pure_noise(family, start):
    y, physics = observation(family)
    samples = WarmStart(start)(y, physics, 0.05, num_samples=2)
    level = torch.full((2,), 1e6)
    noise = 1e6 * torch.randn(2, *SHAPE, generator=generator(3))
    expected = start(noise, level, y, physics, torch.full((2,), 0.05)).clamp(0, 1)
    for sample in samples.unbind(1):
        torch.testing.assert_close(sample, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", [WarmStart(SmoothingStart()), Latino(tiny_prior(), LatinoSetting(2))])
def test_a_noise_level_of_zero_is_refused(method):
    with pytest.raises(ValueError, match="sigma_y must be a positive noise level"):
        method(*observation(Inpainting()), sigma_y=0.0)


# --- zero-shot LATINO ----------------------------------------------------------------------------------------


def test_levels_fall_geometrically():
    levels = LatinoSetting(num_levels=4, tau_first=0.8, tau_last=0.1).levels()
    assert levels == pytest.approx([0.8, 0.4, 0.2, 0.1])
    assert LatinoSetting(num_levels=1, tau_first=0.3).levels() == pytest.approx([0.3])


def test_a_setting_says_what_it_is():
    text = LatinoSetting(num_levels=8, tau_first=0.25, tau_last=0.02, width=2).describe()
    assert text == "8 levels 0.25..0.02, delta = (2 tau)^2"


def squash(x_sigma, sigma):
    return torch.sigmoid(3 * x_sigma - 1) / (1 + sigma.view(-1, 1, 1, 1))


@pytest.mark.parametrize("case", ["blur", "blur per sample", "sr 2", "inpainting"])
def test_latino_is_the_loop_of_its_algorithm(case):
    physics, shape = CASES[case]()
    sigma_y = torch.tensor([0.02, 0.1], dtype=torch.float64)
    x0 = torch.rand(2, *shape, generator=generator(0), dtype=torch.float64)
    y = observe(physics, x0, sigma_y, generator(5))
    setting = LatinoSetting(num_levels=3, tau_first=0.5, tau_last=0.02, width=1.5)
    samples = Latino(squash, setting, PinvStart())(y, physics, sigma_y, num_samples=2, generator=generator(6))

    A, noise = dense(physics.A, shape), generator(6)
    start = (torch.linalg.pinv(A, rtol=1e-5) @ y.flatten(1).unsqueeze(-1)).view_as(x0).clamp(0, 1)
    for sample in samples.unbind(1):
        x = start
        for tau in (0.5, 0.1, 0.02):
            z = x + tau * torch.randn(x.shape, generator=noise, dtype=torch.float64)
            x = 1 / (1 + torch.exp(1 - 3 * z)) / (1 + tau)
            nothing, one = torch.full((2,), torch.inf, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
            x = dense_prox(A, y, x, x, nothing, (1.5 * tau) ** 2 * one, one, sigma_y)
        torch.testing.assert_close(sample, x.clamp(0, 1), rtol=0, atol=1e-7)


def test_latino_with_the_exact_denoiser_of_a_gaussian_beats_its_start():
    """x0 ~ N(1/2, K K^T) with a smooth K, whose denoiser is linear and known in closed form."""
    shape, count = (1, 12, 12), 40
    kernel = CircularBlur(GaussianBlur(0.8).kernel, shape)
    basis = torch.eye(144, dtype=torch.float64).view(-1, *shape)
    root = 0.4 * kernel.A(basis).flatten(1).T
    values, vectors = torch.linalg.eigh(root @ root.T)

    def denoiser(x_sigma, sigma):
        gain = values / (values + sigma[0] ** 2)
        return (0.5 + ((x_sigma - 0.5).flatten(1) @ vectors * gain) @ vectors.T).view_as(x_sigma)

    white = torch.randn(count, 144, generator=generator(1), dtype=torch.float64)
    x0 = (0.5 + white @ root.T).view(count, *shape)
    physics = Inpainting(0.5).draw(count, shape, generator(2))
    y = observe(physics, x0, 0.02, generator(3))
    samples = Latino(denoiser, LatinoSetting(8, 0.3, 0.02))(y, physics, 0.02, num_samples=8, generator=generator(4))
    start = WarmStart(SmoothingStart())(y, physics, 0.02)[:, 0]
    error, error_of_start = ((x - x0).square().mean() for x in (samples.mean(1), start))
    assert error < 0.75 * error_of_start
    assert samples.std(1).mean() > 0.01


@each_family
def test_latino_draws_images_with_the_evaluations_it_claims(family):
    prior = tiny_prior()
    batches = []
    prior.unet.register_forward_hook(lambda module, inputs, _: batches.append(len(inputs[0])))
    latino = Latino(prior, LatinoSetting(num_levels=5))
    y, physics = observation(family)
    samples = latino(y, physics, 0.05, num_samples=3, generator=generator())
    assert samples.shape == (2, 3, *SHAPE)
    assert samples.min() >= 0
    assert samples.max() <= 1
    assert sum(batches) == 2 * 3 * latino.nfe
    assert latino.nfe == 5
    assert torch.equal(latino(y, physics, 0.05, num_samples=3, generator=generator()), samples)
    assert not torch.allclose(samples[:, 0], samples[:, 1], atol=1e-2)


def test_settings_of_the_search_are_a_grid():
    settings = list(latino_settings(6))
    assert len(settings) == len(set(settings)) == 27
    assert {setting.num_levels for setting in settings} == {6}
    for name in ("tau_first", "tau_last", "width"):
        assert len({getattr(setting, name) for setting in settings}) == 3


# --- the search and the comparison ---------------------------------------------------------------------------


class Grey:
    """In place of LATINO: grey of a level that the setting tells."""

    def __init__(self, prior, setting, warm_start=None):
        self.setting, self.nfe = setting, 8
        starts.append(warm_start)

    def __call__(self, y, physics, sigma_y, num_samples=1, generator=None, **options):
        return torch.full((len(y), num_samples, *SHAPE), self.setting.tau_first)


starts: list = []


def far_from_nine(x, reference):
    return (x - 0.9).abs().flatten(1).mean(1)


def test_the_search_returns_the_best_of_all_settings(monkeypatch):
    grid = [LatinoSetting(tau_first=level) for level in (0.1, 0.3, 0.6, 0.8, 0.95)]
    monkeypatch.setattr(ud2m.evaluation.comparison, "latino_settings", lambda: iter(grid))
    monkeypatch.setattr(ud2m.evaluation.comparison, "Latino", Grey)
    starts.clear()
    start = PinvStart()
    validation = [torch.full((2, *SHAPE), 0.55), torch.full((1, *SHAPE), 0.7)]
    distances = {"nine": far_from_nine, "unused": far_from_nine}
    best = search_latino(None, Problem(GaussianBlur(), 0.05), validation, distances, start)
    assert best == {"PSNR": grid[2], "nine": grid[4]}
    assert all(found is start for found in starts)
    assert len(starts) == 5
    assert set(search_latino(None, Problem(GaussianBlur(), 0.05), validation, {})) == {"PSNR"}


def test_the_search_is_that_of_evaluated_settings(monkeypatch):
    grid = [LatinoSetting(2, first, 0.02, width) for first in (0.1, 0.4) for width in (0.5, 2.0)]
    monkeypatch.setattr(ud2m.evaluation.comparison, "latino_settings", lambda: iter(grid))
    prior, problem, validation = tiny_prior(), Problem(SuperResolution(), 0.05), [images(2), images(1, 5)]
    distances = {"distance": lambda x, reference: (x - reference).abs().flatten(1).amax(1)}
    rows = [
        evaluate(Latino(prior, setting), validation, problem, num_samples=2, distances=distances) for setting in grid
    ]
    best = search_latino(prior, problem, validation, distances)
    scores, distances = [row["psnr_mean"] for row in rows], [row["distance"] for row in rows]
    assert len(set(scores)) == len(set(distances)) == 4
    assert best["PSNR"] == grid[scores.index(max(scores))]
    assert best["distance"] == grid[distances.index(min(distances))]


class Spy(OperatorFamily):
    """A family that keeps what it drew."""

    def __init__(self):
        self.family, self.drawn = Inpainting(), []

    def draw(self, *arguments):
        physics = self.family.draw(*arguments)
        self.drawn.append(physics.mask)
        return physics


@pytest.fixture
def sampler(tmp_path):
    prior = adapted(Prior.from_pretrained(save_tiny_prior(tmp_path / "prior")))
    return PosteriorSampler(tiny_network(prior, 2, warm_start="pinv"), prior, SamplerConfig(num_steps=2))


def test_all_methods_are_scored_on_the_same_test_images(sampler, monkeypatch):
    monkeypatch.setattr(
        ud2m.evaluation.comparison, "latino_settings", lambda: iter([LatinoSetting(3), LatinoSetting(3, 0.4)])
    )
    prior, family = tiny_prior(), Spy()
    counts = {"prior": 0, "adapted": 0}
    for name, unet in (("prior", prior.unet), ("adapted", sampler.prior.unet.get_base_model())):
        unet.register_forward_hook(
            lambda module, inputs, _, name=name: counts.update({name: counts[name] + len(inputs[0])})
        )
    validation, test = [images(1, 7)], [images(2), images(1, 8)]
    distances = {"distance": far_from_nine}
    rows = compare(sampler, prior, Problem(family, 0.05), validation, test, 2, distances, num_steps=3)
    assert [(row["method"], row["nfe"]) for row in rows] == [
        ("A^dagger y", 0),
        ("warm start", 0),
        ("LATINO, best PSNR", 3),
        ("LATINO, best distance", 3),
        ("UD2M (K=2, N=3)", 6),
    ]
    assert counts["adapted"] == 6 * 3 * 2
    assert counts["prior"] == 3 * 2 * (2 * 1 + 2 * 3)  # two settings on validation, two winners on the test images
    searched, scored = family.drawn[:2], family.drawn[2:]
    assert torch.equal(*searched)
    assert len(scored) == 5 * 2
    for batch in (0, 1):
        assert all(torch.equal(mask, scored[batch]) for mask in scored[batch::2])
    for row in rows:
        assert {"psnr", "psnr_mean", "ssim", "distance", "residual", "r", "seconds_per_image"} <= row.keys()
        assert (row["r"] is None) == (row["nfe"] == 0)
    assert rows[0]["psnr"] == rows[1]["psnr"]  # this sampler starts from A^dagger y
    assert all("levels" in row["setting"] for row in rows[2:4])


def test_the_row_of_a_sampler_is_its_evaluation(sampler):
    problem, test = Problem(GaussianBlur(), 0.05), [images(2)]
    row = sampler_row(sampler, problem, test, 2, {})
    assert (row["method"], row["nfe"]) == ("UD2M (K=2, N=2)", 4)
    expected = evaluate(sampler, test, problem, num_samples=2)
    assert row["psnr_mean"] == expected["psnr_mean"]
    explicit = sampler_row(sampler, problem, test, 2, {}, num_steps=None, eta=None)
    assert explicit["psnr_mean"] == expected["psnr_mean"]
    assert explicit["nfe"] == 4
