import math
import shutil
import socket
from urllib.error import URLError

import lpips
import numpy as np
import pytest
import skimage.metrics
import torch
from scipy.ndimage import gaussian_filter

from ud2m.evaluation.features import BACKBONES, DISTSDistance, LPIPSDistance, LPIPSFeatures, cached
from ud2m.evaluation.metrics import calibration_ratio, psnr, psnr_limit, spread_and_error, ssim
from ud2m.losses.terms import unit_features


@pytest.fixture
def cache(shared, monkeypatch):
    """Torch cache with the three real backbones; any download fails the test."""
    monkeypatch.setenv("TORCH_HOME", str(shared / "torch_home"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("download"))
    return shared / "torch_home" / "hub" / "checkpoints"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Empty torch cache on a machine without network; lists the time limits that downloads ran under."""
    limits = []

    def refuse(*args, **kwargs):
        limits.append(socket.getdefaulttimeout())
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    return limits


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_equals_scikit_image_per_image():
    x, reference = images(2, 3, 24, 32), images(2, 3, 24, 32, seed=1)
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(x, reference, strict=True)]
    expected = [skimage.metrics.peak_signal_noise_ratio(b, a, data_range=1) for a, b in pairs]
    np.testing.assert_allclose(psnr(x, reference), expected, rtol=1e-5)


def test_ssim_equals_its_definition_per_image():
    reference = images(2, 3, 24, 32, seed=1)
    x = 0.7 * reference + 0.3 * images(2, 3, 24, 32)

    def blur(image):
        return gaussian_filter(image, (0, 1.5, 1.5), mode="mirror", truncate=3.5)

    def definition(a, b):
        mean_a, mean_b = blur(a), blur(b)
        cov, var = blur(a * b) - mean_a * mean_b, blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
        return np.mean(
            (2 * mean_a * mean_b + 1e-4) * (2 * cov + 9e-4) / ((mean_a**2 + mean_b**2 + 1e-4) * (var + 9e-4))
        )

    expected = [definition(a.double().numpy(), b.double().numpy()) for a, b in zip(x, reference, strict=True)]
    np.testing.assert_allclose(ssim(x, reference), expected, rtol=1e-5)


def test_psnr_of_a_known_error():
    x = torch.full((2, 1, 4, 4), 0.5)
    torch.testing.assert_close(psnr(x + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1), x), torch.tensor([20.0, 40.0]))
    assert psnr(x, x).tolist() == [float("inf")] * 2
    assert ssim(images(1, 1, 16, 16), images(1, 1, 16, 16)).tolist() == [1.0]


def test_metrics_refuse_shapes():
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="got"):
            metric(torch.rand(2, 3, 16, 16), torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="at least 11"):
        ssim(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_calibration_ratio_of_a_gaussian_posterior(count, scale, generator):
    # Posterior N(m, s^2) with s different per pixel; the sampler's standard deviation is scale * s. Then
    # E (mean - x0)^2 = s^2 (1 + scale^2 / S), so r = scale whatever S is.
    mean, std = torch.rand(2, 4, 1, 3, 100, 100, generator=generator)
    reference = (mean + std * torch.randn(mean.shape, generator=generator)).squeeze(1)
    samples = mean + scale * std * torch.randn(4, count, 3, 100, 100, generator=generator)
    assert calibration_ratio(*spread_and_error(samples, reference)) == pytest.approx(scale, rel=0.02)
    expected = psnr(mean.squeeze(1), reference)
    torch.testing.assert_close(psnr_limit(samples, reference), expected, rtol=0, atol=0.1)
    assert (psnr(samples.mean(1), reference) < expected - 10 * math.log10(1 + scale**2 / count) + 0.1).all()


def test_the_psnr_of_all_samples_is_bounded_where_the_estimate_is_not_positive():
    x0 = torch.zeros(1, 3, 8, 8)
    samples = torch.stack([x0 + 0.1, x0 - 0.1], 1)  # their mean is exact
    assert psnr_limit(samples, x0).item() == pytest.approx(100)


def test_halved_spread_is_seen(generator):
    reference = torch.randn(2, 3, 64, 64, generator=generator)
    samples = 0.5 * torch.randn(2, 32, 3, 64, 64, generator=generator)
    assert calibration_ratio(*spread_and_error(samples, reference)) == pytest.approx(0.5, abs=0.02)


def test_calibration_needs_two_samples():
    with pytest.raises(ValueError, match="S >= 2"):
        spread_and_error(torch.rand(1, 1, 3, 8, 8), torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="got"):
        spread_and_error(torch.rand(1, 2, 3, 8, 8), torch.rand(1, 1, 8, 8))


def test_squeeze_equals_the_values_printed_by_torchmetrics(cache):
    # The example in the docstring of torchmetrics' learned_perceptual_image_patch_similarity.
    generator = torch.Generator().manual_seed(42)
    first, second = (torch.rand(2, 3, 100, 100, generator=generator) for _ in range(2))
    distance = LPIPSDistance("squeeze")
    torch.testing.assert_close(distance(first, second), torch.tensor([0.1024, 0.0938]), atol=5e-5, rtol=0)
    assert distance.name == "squeeze, lpips 0.1.4"


@pytest.mark.parametrize("net", ["alex", pytest.param("vgg", marks=pytest.mark.slow)])
def test_equals_the_lpips_package(cache, net, monkeypatch):
    first, second = images(2, 3, 40, 48), images(2, 3, 40, 48, seed=1)
    distance = LPIPSDistance(net)
    monkeypatch.undo()  # the package loads with torch.hub itself
    monkeypatch.setenv("TORCH_HOME", str(cache.parents[1]))
    package = lpips.LPIPS(net=net, verbose=False)
    torch.testing.assert_close(distance(first, second), package(first, second, normalize=True).flatten())


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_is_the_weighted_distance_of_its_features(cache, channels):
    features, distance = LPIPSFeatures("squeeze"), LPIPSDistance("squeeze")
    first, second = images(2, channels, 40, 48), images(2, channels, 40, 48, seed=1)
    pairs = zip(unit_features(features, first), unit_features(features, second), distance.network.lins, strict=True)
    layers = [((a - b).square() * lin.model[-1].weight).sum(1).mean((1, 2)) for a, b, lin in pairs]
    torch.testing.assert_close(torch.stack(layers).sum(0), distance(first, second), atol=1e-5, rtol=1e-4)


def similarity_of_maps(a, b, alpha, beta):
    """1 - sum over channels of alpha l + beta s (Ding et al., 2020, equations 3 and 4), of maps [C, h, w]."""
    a, b = a.flatten(1), b.flatten(1)
    luminance = (2 * a.mean(1) * b.mean(1) + 1e-6) / (a.mean(1) ** 2 + b.mean(1) ** 2 + 1e-6)
    covariance = ((a - a.mean(1, keepdim=True)) * (b - b.mean(1, keepdim=True))).mean(1)
    structure = (2 * covariance + 1e-6) / (a.var(1, correction=0) + b.var(1, correction=0) + 1e-6)
    return (alpha * luminance + beta * structure).sum()


def test_dists_equals_its_definition(cache):
    state = torch.load(cache / BACKBONES["vgg"][0], weights_only=True)
    x, reference = images(2, 3, 32, 40), images(2, 3, 32, 40, seed=1)
    distance = DISTSDistance()
    alpha, beta = (weights.flatten() / (distance.network.alpha.sum() + distance.network.beta.sum()) for weights in
                   (distance.network.alpha, distance.network.beta))  # fmt: skip
    hanning = torch.tensor([0.25, 0.5, 0.25])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = []
    for images_of_pair in zip(x, reference, strict=True):
        maps = list(images_of_pair)
        total, first = similarity_of_maps(*maps, alpha[:3], beta[:3]), 3
        maps = [(image - mean) / std for image in maps]
        layers = iter([0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28])
        for stage, convolutions in enumerate((2, 2, 3, 3, 3)):
            if stage:  # pooling of squares with a Hanning window of three pixels
                window = torch.outer(hanning, hanning).expand(len(maps[0]), 1, 3, 3)
                squares = (torch.nn.functional.conv2d(m[None] ** 2, window, None, 2, 1, 1, len(m))[0] for m in maps)
                maps = [(square + 1e-12).sqrt() for square in squares]
            for _ in range(convolutions):
                name = f"features.{next(layers)}"
                weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
                maps = [torch.nn.functional.conv2d(m[None], weight, bias, 1, 1)[0].relu() for m in maps]
            last = first + len(maps[0])
            total, first = total + similarity_of_maps(*maps, alpha[first:last], beta[first:last]), last
        expected.append(1 - total)
    torch.testing.assert_close(distance(x, reference), torch.stack(expected), atol=1e-4, rtol=0)
    torch.testing.assert_close(distance(x[:1], x[:1]), torch.zeros(1), atol=1e-5, rtol=0)
    grey = images(1, 1, 32, 32)
    torch.testing.assert_close(distance(grey, 1 - grey), distance(grey.repeat(1, 3, 1, 1), 1 - grey.repeat(1, 3, 1, 1)))


def test_dists_without_weights_says_where_to_put_them(offline):
    with pytest.raises(FileNotFoundError, match=r"vgg16-397923af\.pth there"):
        DISTSDistance()


def test_lpips_is_frozen_and_differentiable_and_leaves_the_global_stream(cache):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    distance = LPIPSDistance("squeeze").train()
    torch.testing.assert_close(torch.rand(2), expected)
    assert not any(p.requires_grad for p in distance.parameters())
    assert not any(m.training for m in distance.modules())
    x = images(2, 1, 32, 32).requires_grad_()
    assert distance(x, x.detach()).tolist() == [0, 0]
    grey = distance(x, images(2, 1, 32, 32, seed=1))
    grey.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() > 0
    torch.testing.assert_close(grey, distance(x.repeat(1, 3, 1, 1), images(2, 1, 32, 32, seed=1).repeat(1, 3, 1, 1)))


def test_gradient_is_finite_where_a_layer_is_dark(cache):
    distance = LPIPSDistance("squeeze")
    with torch.no_grad():
        for parameter in distance.network.net.parameters():
            parameter.zero_()  # every feature is exactly 0, where the norm has no derivative
    x = images(1, 3, 32, 32).requires_grad_()
    distance(x, images(1, 3, 32, 32, seed=1)).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("net", ["alex", "squeeze", "vgg"])
def test_smallest_image_of_each_net(cache, net):
    distance, smallest = LPIPSDistance(net), BACKBONES[net][1]
    assert torch.isfinite(distance(images(1, 3, smallest, smallest), images(1, 3, smallest, smallest, seed=1))).all()
    with pytest.raises(ValueError, match=f"at least {smallest} pixels"):
        distance(images(1, 3, smallest - 1, 64), images(1, 3, smallest - 1, 64))
    with pytest.raises(ValueError, match="grey or RGB"):
        distance(images(1, 2, 64, 64), images(1, 2, 64, 64))


def test_weights_by_path_and_in_the_cache(cache, offline, tmp_path):
    source, file = cache / BACKBONES["squeeze"][0], tmp_path / "mine.pth"
    assert not cached("squeeze").is_file()
    shutil.copy(source, file)
    by_path = LPIPSDistance("squeeze", weights=str(file))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    shutil.copy(source, tmp_path / "hub" / "checkpoints")
    assert cached("squeeze").is_file()
    by_name = LPIPSDistance("squeeze")
    x, reference = images(1, 3, 32, 32), images(1, 3, 32, 32, seed=1)
    torch.testing.assert_close(by_path(x, reference), by_name(x, reference))
    assert offline == []  # no download was tried
    with pytest.raises(ValueError, match=r"mine\.pth does not hold .* net vgg"):
        LPIPSDistance("vgg", weights=file)


@pytest.mark.parametrize("net", ["alex", "squeeze", "vgg"])
def test_missing_weights_name_file_and_place(offline, tmp_path, net):
    before = socket.getdefaulttimeout()
    assert not cached(net).is_file()
    with pytest.raises(FileNotFoundError) as caught:
        LPIPSDistance(net)
    message, file = str(caught.value), BACKBONES[net][0]
    assert str(tmp_path / "hub" / "checkpoints" / file) in message
    assert f"https://download.pytorch.org/models/{file}" in message
    assert "no network" in message
    assert offline == [10.0]  # one attempt, which cannot hang
    assert socket.getdefaulttimeout() == before


def test_bad_weights_and_nets(offline, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pth do not exist"):
        LPIPSDistance("alex", weights=tmp_path / "absent.pth")
    assert offline == []  # a path that was given is not replaced by a download
    for content in (b"not a checkpoint", b"half a download"):
        (tmp_path / "broken.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*broken\.pth"):
            LPIPSDistance("alex", weights=tmp_path / "broken.pth")
    with pytest.raises(ValueError, match="unknown LPIPS net 'resnet'; allowed: alex, vgg, squeeze"):
        LPIPSDistance("resnet")
