"""Our samplers and priors inside deepinv, against what they give by themselves and against deepinv's own wrapper."""

import deepinv
import diffusers
import pytest
import torch
from conftest import REPOSITORY
from documents import blocks
from tiny import SCHEDULER, SIZE, tiny_unet
from tiny_sampler import build
from torch.utils.data import DataLoader

from ud2m.priors.prior import Prior


@pytest.fixture
def sampler(prior_folder):
    return build(prior_folder)


@pytest.fixture
def physics():
    mask = (torch.rand(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    noise = deepinv.physics.GaussianNoise(0.03)
    return deepinv.physics.Inpainting((3, SIZE, SIZE), mask=mask, noise_model=noise)


@pytest.fixture
def x():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def test_a_reconstructor_is_the_mean_of_samples_at_the_noise_level_of_the_physics(sampler, physics, x):
    y, model = physics(x), sampler.reconstructor(num_samples=3, num_steps=1)
    assert isinstance(model, deepinv.models.Reconstructor)
    samples = sampler(y, physics, 0.03, 3, torch.Generator().manual_seed(5), num_steps=1)
    assert torch.equal(model(y, physics, seed=5), samples.mean(1))
    assert not torch.equal(model(y, physics), model(y, physics))


def test_mean_and_variance_are_those_of_deepinvs_samplers(sampler, physics, x):
    y, model = physics(x), sampler.reconstructor(num_samples=4)
    statistics = [lambda d: d["x"], lambda d: d["x"].amax(1)]
    means, variances = model.sample(y, physics, seed=2, g_statistics=statistics)
    samples = model.samples(y, physics, seed=2)
    for g, mean, variance in zip(statistics, means, variances, strict=True):
        welford = deepinv.sampling.utils.Welford(g({"x": samples[:, 0]}))
        for k in range(1, 4):
            welford.update(g({"x": samples[:, k]}))
        torch.testing.assert_close(mean, welford.mean())
        torch.testing.assert_close(variance, welford.var())
    assert torch.equal(model.sample(y, physics, seed=2)[0], means[0])
    assert sampler.reconstructor(num_samples=1).sample(y, physics)[1].abs().max() == 0
    with pytest.raises(ValueError, match="leave x_init out"):
        model.sample(y, physics, x_init=x)


def test_deepinv_runs_it_as_its_own_diffusion(sampler, physics, x):
    y = physics(x)
    theirs = deepinv.sampling.DiffusionSampler(sampler.reconstructor(num_samples=1), max_iter=4, verbose=False)
    mean, variance = theirs(y, physics)
    assert mean.shape == variance.shape == x.shape
    assert 0 < variance.mean() < 0.3


def test_deepinvs_test_scores_it(sampler, physics, x):
    y, model = physics(x), sampler.reconstructor(num_samples=2)
    model.draw = lambda *args, seen=model.draw, **options: seen(*args, **(options | {"generator": generator()}))
    images = DataLoader([(x[0], y[0]), (x[1], y[1])], batch_size=2)
    scores = deepinv.test(
        *(model, images, physics), metrics=deepinv.metric.PSNR(), verbose=False, show_progress_bar=False
    )
    expected = deepinv.metric.PSNR()(model(y, physics), x).mean().item()
    assert scores["PSNR"] == pytest.approx(expected, abs=1e-3)


def generator():
    return torch.Generator().manual_seed(3)


def test_moving_and_saving_reach_the_networks(sampler):
    model = sampler.reconstructor()
    assert len(list(model.parameters())) == len(list(sampler.network.parameters()))
    assert next(model.double().parameters()).dtype == torch.float64
    assert next(sampler.prior.parameters()).dtype == torch.float64


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("times", [[100.0], [50.0, 700.0]])
def test_a_denoiser_equals_deepinvs_wrapper_at_the_levels_of_the_table(prediction, times, tmp_path):
    options = {key: value for key, value in SCHEDULER.items() if not key.startswith("_")}
    scheduler = diffusers.DDPMScheduler(**(options | {"prediction_type": prediction}))
    diffusers.DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path)
    theirs = deepinv.models.DiffusersDenoiserWrapper(str(tmp_path), clip_output=False)
    prior = Prior.from_pretrained(tmp_path)
    ours = prior.denoiser()
    assert isinstance(ours, deepinv.models.Denoiser)
    x = torch.rand(2, 3, SIZE, SIZE, generator=generator())
    sigma = prior.schedule.sigma(torch.tensor(times))
    sigma = sigma.item() if len(sigma) == 1 else sigma
    with torch.no_grad():
        expected = theirs(x, sigma)
        torch.testing.assert_close(ours(x, sigma), expected, rtol=2e-3, atol=2e-3)
    # it is the level that they agree in: another one gives another image
    with torch.no_grad():
        other = ours(x, 2 * sigma)
    assert (other - expected).abs().max() > 0.02


def test_plug_and_play_of_deepinv_takes_the_prior(prior_folder, physics, x):
    denoiser, y = Prior.from_pretrained(prior_folder).denoiser(), physics(x)
    levels = []
    denoiser.prior.register_forward_hook(lambda module, arguments, result: levels.append(arguments[1]))
    restored = deepinv.optim.DPIR(sigma=0.03, denoiser=denoiser)(y, physics)
    assert restored.shape == x.shape
    assert all(level.shape == (2,) and (level > 0).all() for level in levels)
    assert len({level[0].item() for level in levels}) > 1


@pytest.mark.slow
def test_the_page_runs():
    scope = {}
    for block in blocks(REPOSITORY / "docs" / "deepinv.md", "python"):
        exec(compile(block, "docs/deepinv.md", "exec"), scope)
    assert scope["x_hat"].shape == scope["x"].shape == scope["restored"].shape
    assert scope["scores"]["PSNR"] > 15
    torch.testing.assert_close(scope["variance"].mean(), (scope["square"] - scope["mean"] ** 2).mean() * 4 / 3)
