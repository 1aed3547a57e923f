"""The Fréchet distance, against SciPy's matrix root and a case that is known."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from ud2m.evaluation.scores import Draws, build_score
from ud2m.physics import Denoising, Problem


@pytest.fixture
def alex(shared, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(shared / "torch_home"))
    return build_score("frechet_alex")


def draws(samples, x0):
    return Draws(x0, Problem(Denoising(), 0.01).observe(x0), 0.01, samples)


def pictures(count, seed):
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=rng)
    return torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")


@pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning")  # dead features: the root stays exact enough
@pytest.mark.slow
def test_equals_the_formula_with_another_matrix_root(alex):
    x0, other = pictures(300, 0), pictures(600, 1).view(300, 2, 3, 32, 32) ** 2
    alex.add(draws(other[:150], x0[:150]))
    alex.add(draws(other[150:], x0[150:]))
    one = alex.features(x0).double().numpy()
    two = alex.features(other.flatten(0, 1)).double().numpy()
    assert one.shape == (300, 256)
    root = sqrtm(np.cov(one.T) @ np.cov(two.T)).real
    expected = ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(np.cov(one.T) + np.cov(two.T) - 2 * root)
    found = alex.numbers()
    assert found["frechet_alex"] == pytest.approx(expected, rel=1e-3)
    assert found["frechet_alex_backend"].startswith("alex, lpips")


def test_features_are_those_of_torchvision(alex, shared):
    from torchvision.models import alexnet

    network = alexnet()
    network.load_state_dict(torch.load(shared / "torch_home/hub/checkpoints/alexnet-owt-7be5be79.pth"))
    images = pictures(2, 3)
    # LPIPS scales images by the mean and deviation of ImageNet, up to rounding of its own constants
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    scaled = (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    expected = network.features[:12](scaled).mean((2, 3))
    torch.testing.assert_close(alex.features(images), expected.detach(), rtol=2e-2, atol=1e-3)


@pytest.mark.slow
def test_the_same_set_has_distance_zero_and_few_images_are_refused(alex):
    x0 = pictures(300, 0)
    with pytest.raises(ValueError, match="needs at least 257 images, got 256"):
        alex.check(256, 1, (3, 32, 32))
    alex.add(draws(x0[:20].unsqueeze(1), x0[:20]))
    alex.add(draws(x0[20:].unsqueeze(1), x0[20:]))
    assert abs(alex.numbers()["frechet_alex"]) < 1e-3
