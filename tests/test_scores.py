"""Scores of an evaluation against cases whose answer is known."""

import itertools
import math
from importlib.metadata import PackageNotFoundError

import pytest
import scipy.stats
import torch

from ud2m.evaluation import scores
from ud2m.evaluation.calibration import (
    conditional_frechet,
    debiased_conditional_frechet,
    energy_score,
    gaussian_wasserstein2,
)
from ud2m.evaluation.features import INCEPTION_FILE, LPIPSDistance
from ud2m.evaluation.metrics import calibration_ratio, psnr, spread_and_error, ssim
from ud2m.evaluation.scores import Draws, FeatureDistances, build_score, check_scores, with_interval
from ud2m.evaluation.table import metric_of
from ud2m.physics import GaussianBlur, Inpainting, Observation, Problem, UniformBlur, measured, observe, residual
from ud2m.priors.gaussian_mixture import GaussianMixture

SHAPE = (1, 4, 4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def draws_of(x0, y, physics, sigma_y, noise, samples):
    return Draws(x0, Observation.of(y, physics, sigma_y), noise, samples)


@pytest.fixture(scope="module")
def posterior_draws():
    """Truths with exact posterior samples of a Gaussian mixture, and with narrowed ones."""
    root = torch.randn(2, 16, 16, generator=generator(), dtype=torch.float64)
    covariances = 0.02 * root @ root.transpose(1, 2) / 16 + 1e-4 * torch.eye(16, dtype=torch.float64)
    mixture = GaussianMixture(torch.ones(2), torch.rand(2, *SHAPE, generator=generator(1)), covariances)
    x0 = mixture.sample(160, generator(2))
    physics = UniformBlur(3).draw(160, SHAPE)
    y = observe(physics, x0, 0.05, generator(3))
    posteriors = [mixture.posterior(row[None], physics, 0.05) for row in y]
    exact = torch.stack([p.sample(19, generator(10 + i)) for i, p in enumerate(posteriors)])
    mean = torch.stack([p.mean() for p in posteriors]).unsqueeze(1)

    def draws(samples):
        return draws_of(x0, y, physics, 0.05, 0.05, samples)

    return draws(exact), draws(mean + 0.4 * (exact - mean))


def numbers(name, draws, parts=(100, 60)):
    """Return the numbers of a score that gets the draws in parts."""
    score = build_score(name)
    score.check(len(draws.x0), draws.samples.shape[1], tuple(draws.x0.shape[1:]))
    for rows in torch.arange(len(draws.x0)).split(parts):
        given = draws.observation
        observation = Observation(given.y[rows], given.physics, given.sigma_y[rows])
        score.add(Draws(draws.x0[rows], observation, draws.noise, draws.samples[rows]))
    return score.numbers() | score.curves()


def test_exact_posterior_samples_are_calibrated_and_narrow_ones_are_not(posterior_draws):
    exact, narrow = posterior_draws
    found, wrong = numbers("coverage", exact), numbers("coverage", narrow)
    assert found["coverage_90_nominal"] == pytest.approx(0.9)
    assert found["coverage_90_low"] < 0.9 < found["coverage_90_high"]
    assert found["coverage_50_low"] < found["coverage_50_nominal"] < found["coverage_50_high"]
    assert found["calibration_error"] < 0.03
    # Oracle: the normal law, to which a narrowed Gaussian posterior is near
    expected = 2 * scipy.stats.norm.cdf(0.4 * scipy.stats.norm.ppf(0.95)) - 1
    assert wrong["coverage_90"] == pytest.approx(expected, abs=0.06)
    assert wrong["calibration_error"] > 0.15
    assert [pair[0] for pair in found["calibration"]] == pytest.approx([k / 10 for k in range(9, 0, -1)])
    # of the ranks
    assert numbers("sbc", exact)["sbc_p"] > 0.01
    assert numbers("sbc", narrow)["sbc_p"] < 1e-6
    assert all(sum(row) == 160 for row in numbers("sbc", exact)["ranks"])
    assert numbers("r", exact)["r_low"] < 1 < numbers("r", exact)["r_high"]
    assert numbers("r", narrow)["r_high"] < 0.6


def test_the_deviation_of_samples_is_compared_with_the_error_place_by_place():
    deviation = 10 ** torch.linspace(-2.3, -0.7, 400).expand(60, 400).reshape(60, 1, 20, 20)
    x0, noise = deviation * gaussian(60, 1, 20, 20), gaussian(60, 39, 1, 20, 20, seed=1)
    everywhere = deviation.square().mean().sqrt()  # as much variance in all, in the wrong places
    y, physics = x0, Inpainting(0.1).draw(60, (1, 20, 20), generator())
    samples = {
        "right": deviation.unsqueeze(1) * noise,
        "narrow": 0.25 * deviation.unsqueeze(1) * noise,
        "flat": everywhere * noise,
    }
    found = {
        name: numbers("spatial", draws_of(x0, y, physics, 0.1, 0.1, drawn), (40, 20)) for name, drawn in samples.items()
    }
    assert found["right"]["spatial_error"] < 0.12
    # Oracle: a quarter is two octaves, but for the spread of the mean: E[(mean - x0)^2] = s^2 (1 + 1 / (16 S))
    assert found["narrow"]["spatial_error"] == pytest.approx(2, abs=0.1)
    assert found["flat"]["spatial_error"] < 0.3 < found["narrow"]["spatial_error"]  # one bin, right on average
    inner = [(s, error) for s, error, share in found["right"]["spatial"] if share > 0.05]
    assert len(inner) > 5
    assert all(error == pytest.approx(s, rel=0.15) for s, error in inner)
    assert sum(share for _, _, share in found["right"]["spatial"]) == pytest.approx(1, abs=0.01)
    with pytest.raises(ValueError, match="num_samples of at least 8, got 4"):
        build_score("spatial").check(10, 4, (3, 32, 32))


def test_posterior_samples_leave_residuals_of_the_law_of_the_noise(posterior_draws):
    exact, narrow = posterior_draws
    found = numbers("residual", exact)
    # p-values are uniform for the truth and for posterior samples: both pairs (x, y) have one law
    assert found["residual_p_low"] < 0.5 < found["residual_p_high"]
    assert abs(numbers("residual", narrow)["residual_p"] - 0.5) > 0.05


def test_p_values_count_measured_pixels_alone():
    x0 = torch.rand(400, 1, 8, 8, generator=generator())
    physics = Inpainting(0.6).draw(400, (1, 8, 8), generator(1))
    y = observe(physics, x0, 0.1, generator(2))
    draws = draws_of(x0, y, physics, 0.1, 0.1, x0.unsqueeze(1))
    values = scores._residual(draws)["residual_p"]
    assert scipy.stats.kstest(values.numpy(), "uniform").pvalue > 1e-3
    assert measured(physics, y).mean() < 0.5
    # where methods are told another level than the noise has, there is no such law
    assert "residual_p" not in scores._residual(draws_of(x0, y, physics, 0.2, 0.1, x0.unsqueeze(1)))


def test_means_lie_in_their_intervals_and_are_those_of_all_images():
    x0 = torch.rand(6, 3, 16, 16, generator=generator())
    samples = x0.unsqueeze(1) + 0.1 + 0.1 * gaussian(6, 4, 3, 16, 16)
    observation = Problem(GaussianBlur(), 0.05).observe(x0)
    draws = Draws(x0, observation, 0.05, samples)
    row = {
        "psnr": torch.stack([psnr(sample, x0) for sample in samples.unbind(1)]).mean(),
        "psnr_mean": psnr(samples.mean(1), x0).mean(),
        "ssim": torch.stack([ssim(sample, x0) for sample in samples.unbind(1)]).mean(),
        "residual": torch.stack(
            [residual(observation.physics, sample, observation.y, 0.05) for sample in samples.unbind(1)]
        ).mean(),
        "r": calibration_ratio(*spread_and_error(samples, x0)),
    }
    found = {k: v for n in ("psnr", "ssim", "residual", "r") for k, v in numbers(n, draws, (4, 2)).items()}
    for name in ("psnr", "psnr_mean", "ssim", "residual", "r"):
        assert found[name] == pytest.approx(float(row[name]), rel=1e-5)
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]


def test_diversity_and_energy_have_their_closed_forms():
    x0 = gaussian(3000, 1, 1, 1, seed=1)
    samples = gaussian(3000, 8, 1, 1, 1, seed=2)
    mask = Inpainting().draw(1, (1, 1, 1))
    draws = draws_of(x0, x0, mask, 1.0, 1.0, samples)
    assert numbers("energy", draws, 3000)["energy"] == pytest.approx(1 / math.sqrt(math.pi), abs=0.04)
    assert numbers("diversity", draws, 3000)["diversity"] == pytest.approx(samples.std(1).mean().item(), rel=1e-5)
    mask = Inpainting().draw(1, (1, 4, 4))
    wide = draws_of(*(x.repeat(1, 1, 4, 4) for x in (x0, x0)), mask, 1.0, 1.0, samples.repeat(1, 1, 1, 4, 4))
    # per pixel: the same image sixteen times has the same score
    assert numbers("energy", wide, 3000)["energy"] == pytest.approx(energy_score(samples, x0).mean().item(), rel=1e-5)


def test_cfid_of_jointly_gaussian_pairs_is_the_mean_distance_of_the_conditionals():
    """Oracle: W2 between Gaussians for every y, which is closed form, averaged over y."""
    y = gaussian(200_000, 2).double()
    A, B = torch.tensor([[1.0, 0.5], [0.0, 2.0]]).double(), torch.tensor([[0.8, 0.5], [0.3, 1.5]]).double()
    x = y @ A.T + 0.5 * gaussian(*y.shape, seed=1)
    drawn = y @ B.T + 0.3 + gaussian(*y.shape, seed=2) * torch.tensor([0.2, 0.7])
    P, Q = 0.25 * torch.eye(2).double(), torch.diag(torch.tensor([0.04, 0.49])).double()
    expected = torch.tensor(
        [gaussian_wasserstein2(A @ row, P, B @ row + 0.3, Q) ** 2 for row in y[:4000]], dtype=torch.float64
    ).mean()
    assert conditional_frechet(x, drawn, y) == pytest.approx(expected.item(), rel=0.05)
    # the marginals may agree where the conditionals do not
    shuffled = x[torch.randperm(len(x), generator=generator(3))]
    assert conditional_frechet(x, x, y) == pytest.approx(0, abs=1e-9)
    assert conditional_frechet(x, shuffled, y) > 1


def test_conditional_w2_of_a_shift_is_its_length_and_of_an_independent_sample_the_spread_of_the_mean():
    y = gaussian(6000, 1, 2, 2).double() * 0.1 + 0.5
    physics = Inpainting(1e-9).draw(1, (1, 2, 2))  # A = I: what is conditioned on is y

    def found(drawn):
        return numbers("cw2", draws_of(x0, y, physics, 0.1, 0.1, drawn.unsqueeze(1)), 3000)

    x0 = y + 0.02 * gaussian(*y.shape, seed=1)
    again = y + 0.02 * gaussian(*y.shape, seed=2)
    assert found(again)["cw2"] < 0.005
    assert abs(found(again)["cw2_debiased"]) < 0.005
    shifted = found(again + 0.05)
    assert shifted["cw2"] == pytest.approx(0.05 * 2, rel=0.02)
    assert shifted["cw2_debiased"] == pytest.approx(0.05 * 2, rel=0.02)
    assert shifted["cw2_low"] < 0.1 < shifted["cw2_high"]
    # the right marginal, drawn without looking at y: E|y - m|^2 = 4 x 0.01 of the means, and spreads of 0.102 and 0.02
    blind = x0[torch.randperm(len(x0), generator=generator(3))]
    assert found(blind)["cw2"] == pytest.approx((4 * 0.01 + 4 * (0.102 - 0.02) ** 2) ** 0.5, rel=0.03)


def test_the_debiased_conditional_distance_of_equal_laws_is_0_on_average_where_the_plain_one_is_not():
    plain, debiased, wider = [], [], []
    for seed in range(40):
        y = gaussian(200, 3, seed=3 * seed)
        x, drawn = (y @ torch.ones(3, 8) + gaussian(200, 8, seed=3 * seed + k) for k in (1, 2))
        plain.append(conditional_frechet(x, drawn, y))
        debiased.append(debiased_conditional_frechet(x, drawn, y))
        wider.append(debiased_conditional_frechet(x, 2 * drawn - y @ torch.ones(3, 8), y))
    error = torch.tensor(debiased).std().item() / 40**0.5
    assert abs(sum(debiased) / 40) < 3 * error
    assert sum(plain) / 40 > 0.2 > 5 * error
    assert sum(wider) / 40 == pytest.approx(8, rel=0.1)  # eight features, deviations of 1 and 2


def test_cfid_refuses_rows_that_do_not_belong_together():
    with pytest.raises(ValueError, match=r"a row for each image, got \[5, 2\], \[5, 2\] and \[4, 2\]"):
        conditional_frechet(gaussian(5, 2), gaussian(5, 2), gaussian(4, 2))


def test_intervals_are_narrower_for_more_images_and_absent_where_undefined():
    wide, narrow = (with_interval("x", gaussian(n)) for n in (20, 2000))
    assert wide["x_high"] - wide["x_low"] > 5 * (narrow["x_high"] - narrow["x_low"])
    assert with_interval("x", torch.tensor([1.0, math.inf]))["x_low"] is None


# --- backbones ------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(shared, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(shared / "torch_home"))


def picture_draws(count, samples=1, size=32):
    x0 = torch.rand(count, 3, size, size, generator=generator())
    drawn = (x0.unsqueeze(1) + 0.1 * gaussian(count, samples, 3, size, size)).clamp(0, 1)
    return draws_of(x0, x0, Inpainting().draw(1, (3, size, size)), 0.1, 0.1, drawn)


@pytest.mark.slow
def test_distances_of_sets_are_those_of_torchmetrics(weights):
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    draws = picture_draws(300)
    frechet, kid = numbers("frechet_alex", draws, 150), numbers("kid_alex", draws, 150)
    features = FeatureDistances("alex", "kid").features
    fid = FrechetInceptionDistance(features, normalize=True)
    kernel = KernelInceptionDistance(features, normalize=True, subsets=1, subset_size=300)
    for metric in (fid, kernel):
        metric.update(draws.x0, real=True)
        metric.update(draws.samples[:, 0], real=False)
    assert frechet["frechet_alex"] == pytest.approx(fid.compute().item(), rel=1e-3)
    assert kid["kid_alex"] == pytest.approx(kernel.compute()[0].item(), rel=1e-3)
    assert frechet["frechet_alex_backend"].startswith("alex, lpips ")
    # the interval: about the deviation between halves of the set that are not the same images
    assert 0 < frechet["frechet_alex_high"] - frechet["frechet_alex"] < frechet["frechet_alex"]


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """A torch cache with random weights of Inception; those of FID come with no package."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    file = tmp_path / "hub/checkpoints" / INCEPTION_FILE
    file.parent.mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(module, "load_state_dict_from_url", lambda *args, **options: None)
        patched.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        torch.save(module.FeatureExtractorInceptionV3("any", ["2048"]).state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return file


@pytest.mark.slow
def test_fid_is_that_of_torchmetrics(inception):
    from torchmetrics.image.fid import FrechetInceptionDistance

    draws = picture_draws(8)
    score = FeatureDistances("inception", "frechet")
    score.repeats = 2
    score.add(draws)
    found = score.numbers()
    fid = FrechetInceptionDistance(2048, normalize=True, feature_extractor_weights_path=str(inception), antialias=False)
    fid.update((255 * draws.x0).round() / 255, real=True)
    fid.update((255 * draws.samples[:, 0]).round() / 255, real=False)
    assert found["frechet_inception"] == pytest.approx(fid.compute().item(), rel=1e-2)
    assert found["frechet_inception_backend"].startswith("inception-v3-compat, torch-fidelity ")
    with pytest.raises(ValueError, match="in 2048 features it needs at least 2049 images, got 2048"):
        check_scores(["frechet_inception"], 2048, 8, (3, 32, 32))


def test_what_fid_needs_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"the metric kid_inception .*{INCEPTION_FILE} into {tmp_path}"):
        build_score("kid_inception")
    file = tmp_path / "hub/checkpoints" / INCEPTION_FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half a download")
    with pytest.raises(ValueError, match="does not hold the weights of Inception"):
        build_score("kid_inception")
    torch.save({"weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="does not hold the weights of Inception"):
        build_score("kid_inception")

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("ud2m.evaluation.features.version", missing)
    with pytest.raises(ValueError, match=r"the metric kid_inception cannot be computed: .*pip install torch-fidelity"):
        check_scores(["kid_inception"], 100, 1, (3, 32, 32))


@pytest.mark.slow
def test_patches_are_pieces_of_the_images(weights):
    draws = picture_draws(80, size=64)
    pieces = draws_of(
        *(torch.cat([x[..., :32, :32], x[..., :32, 32:], x[..., 32:, :32], x[..., 32:, 32:]]) for x in (draws.x0,) * 2),
        picture_draws(1, size=32).observation.physics,
        0.1,
        0.1,
        torch.cat([draws.samples[..., i : i + 32, j : j + 32] for i in (0, 32) for j in (0, 32)]),
    )
    whole = numbers("frechet_alex_32", draws, 80)
    assert whole["frechet_alex_32"] == pytest.approx(numbers("frechet_alex", pieces, 320)["frechet_alex"], rel=1e-6)


def test_networks_of_scores_move_to_the_images(weights):
    for name in ("lpips", "kid_alex"):
        (module,) = build_score(name).to("meta").modules
        assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    assert build_score("psnr").to("meta").modules == ()


def test_lpips_is_the_package_and_diversity_is_that_between_samples(weights):
    draws = picture_draws(4, samples=3)
    found = numbers("lpips", draws, 2)
    distance = LPIPSDistance("alex")
    single = torch.stack([distance(draws.samples[:, s], draws.x0) for s in range(3)])
    assert found["lpips"] == pytest.approx(single.mean().item(), rel=1e-5)
    between = torch.stack([distance(draws.samples[:, s], draws.samples[:, s + 1]) for s in range(2)])
    assert found["diversity_lpips"] == pytest.approx(between.mean().item(), rel=1e-5)
    assert found["lpips_backend"].startswith("alex, lpips ")


def test_lpips_freed_of_spread_is_that_of_the_mean_of_all_samples_features(weights):
    # a sampler that draws one of two pictures: the mean over its four pairs of samples is what is expected of two
    a, b, x0 = torch.rand(3, 3, 32, 32, generator=generator())
    pairs = torch.stack([torch.stack(pair) for pair in itertools.product((a, b), repeat=2)])
    truths = x0.expand(4, -1, -1, -1)
    found = numbers("lpips", draws_of(truths, truths, Inpainting().draw(1, x0.shape), 0.1, 0.1, pairs), 2)

    net = LPIPSDistance("alex").network

    def features(image):
        layers = net.net(net.scaling_layer(2 * image[None] - 1))
        return [layer / (layer.square().sum(1, keepdim=True).sqrt() + 1e-10) for layer in layers]

    expected = sum(
        net.lins[k].model(((f + g) / 2 - f0).square()).mean().item()
        for k, (f, g, f0) in enumerate(zip(features(a), features(b), features(x0), strict=True))
    )
    assert found["lpips_limit"] == pytest.approx(expected, rel=1e-4)
    assert found["lpips_limit"] < found["lpips"]
    assert metric_of("lpips_limit_vgg") == "lpips_vgg"


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["lpips_alex", "frechet", "frechet_vgg19", "fid", "cfid_alex_32", "kid_alex_x", "psnr_alex"]
)
def test_unknown_metrics_are_refused(name):
    with pytest.raises(ValueError, match=f"unknown metric '{name}'.*; known: psnr, psnr_limit, ssim, .*lpips"):
        build_score(name)


def test_a_metric_without_the_weights_of_its_backbone_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("lpips_vgg", "kid_vgg"):
        with pytest.raises(FileNotFoundError, match=rf"the metric {name} cannot be computed: .* vgg16-397923af.pth"):
            check_scores([name], 1000, 8, (3, 32, 32))


@pytest.mark.parametrize(
    ("name", "images", "samples", "size", "words"),
    [
        ("psnr", 1, 8, (3, 32, 32), "at least 2 images, got 1"),
        ("ssim", 10, 8, (1, 8, 8), "at least 11 pixels a side, got 8x8"),
        ("energy", 10, 1, (3, 32, 32), "num_samples of at least 2, got 1"),
        ("coverage", 10, 8, (3, 32, 32), r"90 % need at least 13 samples .* got 8"),
        ("sbc", 99, 19, (3, 32, 32), "need at least 100 images .* got 99"),
        ("r", 10, 1, (3, 32, 32), "num_samples of at least 2, got 1"),
        ("cw2", 2048, 8, (1, 32, 32), "need at least 2049 images, got 2048"),
    ],
)
def test_what_gives_no_sensible_number_is_refused(name, images, samples, size, words):
    with pytest.raises(ValueError, match=rf"the metric {name}: .*{words}"):
        check_scores([name], images, samples, size)


@pytest.mark.parametrize(
    ("name", "images", "size", "words"),
    [
        ("frechet_alex", 256, (3, 32, 32), "in 256 features it needs at least 257 images, got 256"),
        ("kid_alex", 49, (3, 32, 32), "at least 50 images, got 49"),
        ("cfid_alex", 512, (3, 32, 32), "at least 513 images, got 512"),
        ("frechet_alex_64", 64, (3, 128, 128), "at least 257 patches, got 256"),
        ("frechet_alex_50", 999, (3, 128, 128), "patches of 50 do not divide images of 128x128"),
        ("kid_alex_16", 999, (3, 32, 32), "at least 31 pixels a side"),
    ],
)
def test_too_few_images_for_a_distance_of_sets_are_refused(weights, name, images, size, words):
    with pytest.raises(ValueError, match=rf"the metric {name}: .*{words}"):
        check_scores([name], images, 8, size)
