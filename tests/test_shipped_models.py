"""Shipped models: how they are shipped, the examples that load them, and what is measured with them."""

import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from documents import blocks
from PIL import Image
from safetensors.torch import load_file
from tiny import adapted, save_tiny_prior, tiny_network

import ud2m.priors.shipped
from ud2m.cli.models import shipped_models
from ud2m.images import read_image, write_image
from ud2m.priors.prior import Prior
from ud2m.samplers.ud2m import PosteriorSampler, SamplerConfig

sys.path[:0] = [str(REPOSITORY / "benchmarks"), str(REPOSITORY / "data_prep")]
ship_model = importlib.import_module("ship_model")


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Ship a micro prior and a micro model under the names of the documents; return the folder."""
    folder = tmp_path / "pretrained"
    monkeypatch.setattr(ud2m.priors.shipped, "SHIPPED", folder)
    save_tiny_prior(tmp_path / "prior")
    ship_model.ship(tmp_path / "prior", "photos_prior", "photos_prior")
    model = adapted(Prior.from_pretrained(tmp_path / "prior"))
    info = {"physics": {"operator": {"class": "ud2m.physics.GaussianBlur", "width": 1.6}, "sigma_y": 0.01}}
    config = SamplerConfig(num_steps=2, info=info)
    PosteriorSampler(tiny_network(model, 2), config).save_pretrained(tmp_path / "export")
    ship_model.ship(tmp_path / "export", "photographs_gaussian_blur", "photos_prior")
    return folder


def test_rows_of_models_that_are_not_measured_again_stay():
    merged = importlib.import_module("precision").merged
    stored = [{"operator": name, "psnr": k} for k, name in enumerate(["a", "a", "b", "gone"])]
    assert merged(stored, [{"operator": "c"}, {"operator": "b", "psnr": 7}], ["a", "b", "c"]) == [
        {"operator": "a", "psnr": 0},
        {"operator": "a", "psnr": 1},
        {"operator": "b", "psnr": 7},
        {"operator": "c"},
    ]


# --- examples in Python ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "docs/sampling.md"])
def test_the_python_example_runs(name, shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(torch.rand(3, 24, 32), Path("blurred.png"))
    (block,) = blocks(REPOSITORY / name, "python")
    scope: dict = {}
    exec(compile(block, name, "exec"), scope)
    assert scope["samples"].shape == (1, 8, 3, 24 + 12, 32 + 12)  # with the border of the kernel
    if name != "README.md":
        assert read_image("mean.png").shape == read_image("std.png").shape == (3, 36, 44)


def test_models_that_rounding_costs_more_than_the_bound_are_evaluated_in_float32():
    rows = json.loads((REPOSITORY / "docs" / "results" / "precision.json").read_text())["rows"]
    rounded = {row["operator"]: row for row in rows if row["method"] == "bfloat16"}
    assert rounded.keys() == set(shipped_models())
    for name, row in rounded.items():
        costs = row["loss of PSNR of mean [dB]"] > 0.02 or row["loss of LPIPS"] > 0.001
        assert PosteriorSampler.from_pretrained(name).config.needs_float32 == costs, name


# --- the prior beside classical methods ------------------------------------------------------------------------------


def test_the_best_setting_is_the_one_of_highest_psnr():
    denoising = importlib.import_module("prior_denoising")
    x0 = torch.full((4, 3, 32, 32), 0.5)
    noisy = denoising.add_noise(x0, 0.1)
    assert (noisy - x0).std().item() == pytest.approx(0.1, rel=0.05)
    settings = [denoising.Setting(f"{w:g}", lambda y, w=w: 0.5 + w * (y - 0.5)) for w in (1.0, 0.2, 0.6)]
    assert denoising.best_setting(settings, noisy, x0).words == "0.2"
    # white noise of standard deviation w sigma
    assert denoising.mean_psnr(settings[2].denoise, noisy, x0) == pytest.approx(24.437, abs=0.1)


def test_the_prior_is_measured_beside_classical_methods(shipped):
    denoising = importlib.import_module("prior_denoising")
    ramp = torch.linspace(0, 1, 32).expand(2, 3, 32, 32)
    rows = denoising.measure(Prior.from_pretrained("photos_prior"), {32: ramp}, levels=(0.1,))
    scores = {row["method"]: row["psnr@0.1"] for row in rows}
    assert scores["noisy image"] == pytest.approx(20.5, abs=0.5)
    assert min(scores["non-local means"], scores["total variation (Chambolle)"]) > 25
    assert "σ = 0.1: weight" in rows[1]["setting"]
    assert rows[-1]["method"] == "prior"


@pytest.mark.slow
def test_pictures_have_a_sheet_per_scene_and_a_row_per_operator(shipped, tmp_path, monkeypatch):
    gallery = importlib.import_module("gallery")
    monkeypatch.setattr(gallery, "SIDE", 32)
    gallery.main(["--model", "photographs_gaussian_blur", "--output", str(tmp_path / "new")])
    sizes = {path.stem: read_image(path).shape[1:] for path in (tmp_path / "new").iterdir()}
    assert sizes.keys() == {"overview", *(f"gallery-{name}" for name in gallery.SCENES)}
    for name, (height, width) in sizes.items():
        assert width / height == pytest.approx(3 / 2 if name == "overview" else 4 / 3, rel=0.15)
    assert {path.stem for path in (REPOSITORY / "docs" / "images").glob("gallery-*")} <= sizes.keys()


@pytest.mark.slow
def test_pictures_that_would_be_large_are_compressed_more():
    gallery = importlib.import_module("gallery")
    noise = np.random.default_rng(0).integers(0, 256, (540, 540, 3), dtype=np.uint8)
    flat = np.zeros_like(noise)
    sizes = [len(gallery.compressed(Image.fromarray(pixels), "webp")) for pixels in (noise, flat)]
    assert sizes[1] < 2_000 < gallery.MAX_BYTES / 2 < sizes[0] <= gallery.MAX_BYTES
    with_quality = io.BytesIO()
    Image.fromarray(noise).save(with_quality, format="webp", quality=gallery.QUALITIES[0], method=6)
    assert with_quality.tell() > gallery.MAX_BYTES
    for name in ("overview", *(f"gallery-{scene}" for scene in gallery.SCENES)):
        assert (REPOSITORY / "docs" / "images" / f"{name}.webp").stat().st_size <= gallery.MAX_BYTES


def test_the_least_certain_place_is_that_of_the_largest_mean_deviation():
    gallery = importlib.import_module("gallery")
    std = torch.full((3, 16, 24), 0.1)
    std[:, 5:9, 13:17] = 0.2
    std[:, 0, 0] = 1.0  # one pixel is no place
    assert gallery.most_uncertain(std, 4) == (slice(None), slice(5, 9), slice(13, 17))


# --- shipping --------------------------------------------------------------------------------------------------------


def test_a_shipped_model_equals_the_export(shipped, tmp_path):
    files = {path.name for path in (shipped / "photographs_gaussian_blur").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "config.json", "psi.safetensors"}
    adapter = load_file(shipped / "photographs_gaussian_blur" / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float16}
    ours = PosteriorSampler.from_pretrained("photographs_gaussian_blur")
    export = PosteriorSampler.from_pretrained(tmp_path / "export")
    assert ours.prior.reference == "photos_prior"
    assert ours.config == export.config
    theirs = export.network.state_dict()
    for name, value in ours.network.state_dict().items():
        assert value.dtype == theirs[name].dtype
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-3)


def test_a_model_of_rank_zero_ships_without_adapter(shipped, tmp_path):
    prior = Prior.from_pretrained(tmp_path / "prior")
    PosteriorSampler(tiny_network(prior, 1)).save_pretrained(tmp_path / "psi_only")
    folder = ship_model.ship(tmp_path / "psi_only", "psi_only", "photos_prior")
    assert {path.name for path in folder.iterdir()} == {"config.json", "psi.safetensors"}


def test_a_model_ships_with_options_of_its_own(shipped, tmp_path):
    def ship(*options: str) -> None:
        given = [str(tmp_path / "export"), "photographs_gaussian_blur", "--replace", "--prior=photos_prior"]
        ship_model.main([*given, "--options", *options])

    ship("num_steps=5", "grid_power=1.5", "eta=0.0")
    config = PosteriorSampler.from_pretrained("photographs_gaussian_blur").config
    assert config == PosteriorSampler.from_pretrained(tmp_path / "export").config.with_options(
        num_steps=5, grid_power=1.5, eta=0.0
    )
    before = (shipped / "photographs_gaussian_blur" / "config.json").read_bytes()
    for refused in ("step_scale=0", "steps=5"):
        with pytest.raises(ValueError, match=refused.split("=")[0]):
            ship(refused)
    with pytest.raises(ValueError, match=r"is a prior.*num_steps"):
        ship_model.ship(tmp_path / "prior", "photos_prior", "", True, {"num_steps": 5})
    with pytest.raises(SystemExit):
        ship("num_steps")
    assert (shipped / "photographs_gaussian_blur" / "config.json").read_bytes() == before


def test_what_must_not_be_shipped_is_refused(shipped, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in shipped.rglob("*") if path.is_file()}
    save_tiny_prior(tmp_path / "other", seed=1)
    ship_model.ship(tmp_path / "other", "other_prior", "")
    with pytest.raises(ValueError, match="fingerprint"):
        ship_model.ship(tmp_path / "export", "model", "other_prior")
    with pytest.raises(ValueError, match="ship it first"):
        ship_model.ship(tmp_path / "export", "model", "no_prior")
    with pytest.raises(ValueError, match="--replace"):
        ship_model.ship(tmp_path / "export", "photographs_gaussian_blur", "photos_prior")
    with pytest.raises(ValueError, match="plain name"):
        ship_model.ship(tmp_path / "export", "../model", "photos_prior")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ship_model.ship(tmp_path / "nowhere", "model", "photos_prior")
    monkeypatch.setattr(ship_model, "MODEL_LIMIT", 1000)
    with pytest.raises(ValueError, match="too many"):
        ship_model.ship(tmp_path / "export", "photographs_gaussian_blur", "photos_prior", replace=True)
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in shipped.iterdir()} == {"photos_prior", "photographs_gaussian_blur", "other_prior"}


def test_replacing_a_shipped_prior(shipped, tmp_path):
    save_tiny_prior(tmp_path / "other", seed=1)
    ship_model.ship(tmp_path / "other", "photos_prior", "", replace=True)
    assert Prior.from_pretrained("photos_prior").fingerprint == Prior.from_pretrained(tmp_path / "other").fingerprint
    assert not list(shipped.glob(".*"))
