"""Operators of deepinv on the command line: the documented keys, complex images, observations that are no images."""

import json

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir
from tiny import SIZE, adapted, save_tiny_prior, tiny_network

from ud2m.cli import as_override, plain
from ud2m.cli.pages import part
from ud2m.cli.sample import main
from ud2m.evaluation.scores import build_score, fitting_scores
from ud2m.images import read_image, viewable, write_image, write_values
from ud2m.physics import DeepinvOperator
from ud2m.priors.prior import Prior
from ud2m.samplers.ud2m import PosteriorSampler, SamplerConfig

TOMOGRAPHY = ("physics=deepinv", "physics.class=Tomography", "physics.parameters.angles=12")
TOMOGRAPHY += ("physics.parameters.normalize=false",)


def sample(*overrides):
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        main(compose("sample", [*map(as_override, ("lpips=null", "num_samples=2", *overrides))]))


def model(folder, channels):
    prior = adapted(
        Prior.from_pretrained(save_tiny_prior(folder / "prior", in_channels=channels, out_channels=channels))
    )
    info = {"physics": {"operator": {"class": "ud2m.physics.Denoising"}, "sigma_y": 0.05}}
    sampler = PosteriorSampler(tiny_network(prior), SamplerConfig(num_steps=2, sigma_y=0.05, info=info))
    sampler.save_pretrained(folder / f"export{channels}")
    return f"model={folder / f'export{channels}'}"


def images(channels, seed=0):
    return torch.rand(channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("command", ["sample", "train"])
def test_documented_keys_compose(command):
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        page = plain(compose(command, [*map(as_override, TOMOGRAPHY)]).physics)
    assert page["operator"]["parameters"] == {"angles": 12, "normalize": False}
    assert page["operator"]["name"] == "Tomography"


def test_documented_keys_of_an_evaluation():
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        compose("evaluate")
        page = part("physics", "deepinv class=Tomography parameters.angles=12")
    assert page["operator"]["parameters"] == {"angles": 12}
    assert as_override("physics.sigma_y=1") == "physics.sigma_y=1"


@pytest.mark.slow
def test_a_sinogram_is_scored_shown_and_taken_back(tmp_path):
    write_image(images(3), tmp_path / "x.png")
    given = model(tmp_path, 3)
    sample(given, f"input={tmp_path / 'x.png'}", *TOMOGRAPHY, f"output={tmp_path / 'out'}")
    (row,) = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert row["residual"] > 0
    y = np.load(tmp_path / "out" / "observation.npy")
    x0 = read_image(tmp_path / "x.png")[None]
    operator = DeepinvOperator("Tomography", {"angles": 12, "normalize": False}).draw(1, (3, SIZE, SIZE))
    assert np.abs(y - operator.A(x0)[0].numpy()).std() == pytest.approx(0.01, rel=0.7)
    assert "black" in (tmp_path / "out" / "report.html").read_text()
    assert y.max() > 1.5  # and is read all the same
    np.save(tmp_path / "y.npy", y)
    size = f"physics.operator.size=[3,{SIZE},{SIZE}]"
    common = (given, f"input={tmp_path / 'y.npy'}", "degraded=true", *TOMOGRAPHY)
    sample(*common, size, f"output={tmp_path / 'again'}")
    assert read_image(tmp_path / "again" / "mean.png").shape == (3, SIZE, SIZE)
    with pytest.raises(SystemExit):
        sample(*common, f"output={tmp_path / 'none'}")  # without the size of the image
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_complex_images_are_written_as_modulus_and_numbers(tmp_path):
    x0 = images(2)
    np.save(tmp_path / "x.npy", (x0[0] + 1j * x0[1]).numpy())
    mask = (torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    np.save(tmp_path / "mask.npy", mask.numpy())
    mri = ("physics=deepinv", "physics.class=MRI", f"physics.parameters.mask={tmp_path / 'mask.npy'}")
    given = model(tmp_path, 2)
    sample(given, f"input={tmp_path / 'x.npy'}", *mri, f"output={tmp_path / 'out'}")
    samples = [np.load(tmp_path / "out" / "samples" / f"{k:03d}.npy") for k in range(2)]
    assert samples[0].shape == (2, SIZE, SIZE)
    np.testing.assert_allclose(np.load(tmp_path / "out" / "mean.npy"), sum(samples) / 2, atol=1e-6)
    shown = read_image(tmp_path / "out" / "samples" / "000.png", channels=1)[0].numpy()
    modulus = np.hypot(*samples[0])
    np.testing.assert_allclose(shown, (modulus - modulus.min()) / np.ptp(modulus), atol=1 / 250)
    # k-space of a scanner is complex
    y = np.load(tmp_path / "out" / "observation.npy")
    np.save(tmp_path / "y.npy", y[0] + 1j * y[1])
    sample(given, f"input={tmp_path / 'y.npy'}", "degraded=true", *mri, f"output={tmp_path / 'again'}")
    assert np.load(tmp_path / "again" / "observation.npy") == pytest.approx(y)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Pansharpen", "SinglePixelCamera"])
def test_observations_in_parts_and_vectors(name, tmp_path):
    write_image(images(3), tmp_path / "x.png")
    more = ("physics.parameters.m=100",) if name == "SinglePixelCamera" else ()
    given = (model(tmp_path, 3), f"input={tmp_path / 'x.png'}", "physics=deepinv", f"physics.class={name}")
    sample(*given, *more, f"output={tmp_path / 'out'}")
    assert np.load(tmp_path / "out" / "observation.npy").size > 0
    assert (tmp_path / "out" / "observation.png").is_file()


def test_what_numbers_look_like(tmp_path):
    assert viewable(images(3))[1] == ""
    coils = torch.randn(2, 4, 5, 6)
    picture, remark = viewable(coils)
    assert picture.shape == (1, 5, 24)
    assert "modulus over channels" in remark
    vector, _ = viewable(torch.arange(10.0))
    assert vector.shape == (1, 3, 4)
    assert vector[0, 0, 0] == 0
    assert vector.max() == 1
    write_values(images(1), tmp_path / "grey.png")
    assert not (tmp_path / "grey.npy").exists()
    write_values(coils, tmp_path / "coils.png")
    assert np.load(tmp_path / "coils.npy").shape == (2, 4, 5, 6)


def test_scores_for_colours_are_left_out_for_others():
    names = ["psnr", "lpips"]
    assert len(fitting_scores(names, 2, (2, 64, 64))) == 1
    assert len(fitting_scores(names, 2, (3, 64, 64))) in (1, 2)  # its weights may be missing
    score = build_score("psnr")
    score.channels = (1, 3)
    with pytest.raises(ValueError, match="images of 1 or 3 channels, got 2"):
        score.check(5, 2, (2, 64, 64))
