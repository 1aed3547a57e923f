"""A photograph that is brought is not periodic: the boundaries of blurs, and what a residual far from 1 says."""

import json

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir
from tiny import SIZE, adapted, save_tiny_prior, tiny_network

from ud2m.cli import plain
from ud2m.cli.pages import part
from ud2m.cli.sample import main
from ud2m.images import read_image, write_image
from ud2m.physics import BlurMixture, GaussianBlur, misfit, observe
from ud2m.priors.prior import Prior
from ud2m.samplers.ud2m import PosteriorSampler, SamplerConfig

BLURS = ("gaussian_blur", "uniform_blur", "motion_blur", "kernel")


def composed(command, *overrides):
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return compose(command, list(overrides))


def sample(*overrides):
    main(composed("sample", *overrides))


@pytest.mark.parametrize("page", BLURS)
def test_the_boundary_of_a_page(page):
    given = [f"physics={page}", *(["physics.kernel=k.npy"] if page == "kernel" else [])]

    def boundary(command, *overrides):
        return plain(composed(command, *given, *overrides).physics)["operator"]["boundary"]

    assert boundary("sample", "degraded=true") == "valid"
    assert boundary("sample") == "circular"
    assert boundary("sample", "degraded=true", "physics.operator.boundary=circular") == "circular"
    assert boundary("sample", "physics.operator.boundary=zero") == "zero"
    assert boundary("train") == "circular"


def test_evaluations_are_as_training():
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        compose("evaluate")
        assert part("physics", "gaussian_blur")["operator"]["boundary"] == "circular"


def test_the_scene_of_a_family():
    blur, black = GaussianBlur(0.8), GaussianBlur(0.8, boundary="zero")
    assert blur.of_scene().image_shape((3, 8, 8)) == (3, 14, 14)
    assert blur.image_shape((3, 8, 8)) == (3, 8, 8)
    assert black.of_scene() is black
    assert BlurMixture([blur]).of_scene().boundary == "valid"


def test_a_blurred_picture_for_a_models_own_operator(tmp_path):
    prior = adapted(Prior.from_pretrained(save_tiny_prior(tmp_path / "prior")))
    operator = {"class": "ud2m.physics.GaussianBlur", "width": 0.8}
    info = {"physics": {"operator": operator, "sigma_y": 0.05}}
    sampler = PosteriorSampler(tiny_network(prior), SamplerConfig(num_steps=2, sigma_y=0.05, info=info))
    sampler.save_pretrained(tmp_path / "export")
    write_image(torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), tmp_path / "y.png")
    common = (f"model={tmp_path / 'export'}", f"input={tmp_path / 'y.png'}", "lpips=null", "num_samples=1")
    border = GaussianBlur(0.8).taps[0] - 1
    for degraded, side in (("true", SIZE + border), ("false", SIZE)):
        sample(*common, f"degraded={degraded}", f"output={tmp_path / degraded}")
        assert read_image(tmp_path / degraded / "mean.png").shape == (3, side, side)


def test_what_a_residual_says():
    physics = GaussianBlur().draw(1, (3, 32, 32))
    for value, words in ((1.45, "larger sigma_y"), (0.7, "smaller one"), (float("nan"), "larger sigma_y")):
        hint = misfit(physics, value)
        assert words in hint
        assert all(word in hint for word in ("width", "sigma_y", "boundary"))
    assert misfit(physics, 1.1) == misfit(physics, 0.9) == ""


@pytest.mark.slow
def test_a_photograph_has_no_bars_along_its_edges(tmp_path):
    """A scene with different borders, blurred as by a camera, for a shipped model and its own operator."""
    rows, columns = np.mgrid[0:76, 0:76] / 76
    scene = np.stack([rows, columns * rows, 0.2 + 0.6 * (np.hypot(rows - 0.5, columns - 0.3) < 0.25)])
    x0 = torch.from_numpy(scene).float()
    blur = GaussianBlur(1.6, boundary="valid")
    y = observe(blur.draw(1, (3, 76, 76)), x0[None], 0.01, torch.Generator().manual_seed(0))[0]
    np.save(tmp_path / "y.npy", y.numpy())
    common = (
        "model=photos_gaussian_blur",
        f"input={tmp_path / 'y.npy'}",
        "degraded=true",
        "lpips=null",
        "num_samples=2",
    )
    sample(*common, f"output={tmp_path / 'valid'}")
    circular = ("physics=gaussian_blur", "physics.operator.boundary=circular")
    sample(*common, *circular, f"output={tmp_path / 'circular'}")
    residual = {
        name: json.loads((tmp_path / name / "metrics.json").read_text())[0]["residual"]
        for name in ("valid", "circular")
    }
    assert 0.85 < residual["valid"] < 1.2 < residual["circular"]
    inner = x0[:, 6:-6, 6:-6]
    error = {
        "valid": (read_image(tmp_path / "valid" / "mean.png")[:, 6:-6, 6:-6] - inner).square().mean().sqrt().item(),
        "circular": (read_image(tmp_path / "circular" / "mean.png") - inner).square().mean().sqrt().item(),
    }
    assert error["valid"] < 0.5 * error["circular"]
