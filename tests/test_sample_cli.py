"""sample.py: what it writes, and what it says about bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from html_pages import Page
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image, ImageCms
from tiny import SIZE, adapted, save_tiny_prior, tiny_network

from ud2m.cli import describe
from ud2m.cli.commands import TASKS
from ud2m.cli.sample import trained_operator
from ud2m.images import PixelFormat, pixel_format, read_image, write_image
from ud2m.physics import PixelMask, SuperResolution, misfit
from ud2m.priors.prior import Prior
from ud2m.samplers.ud2m import PosteriorSampler, SamplerConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """An export for super-resolution x2 with a micro prior."""
    folder = tmp_path_factory.mktemp("model")
    prior = adapted(Prior.from_pretrained(save_tiny_prior(folder / "prior")))
    operator = {"class": "ud2m.physics.SuperResolution", "factor": 2}
    info = {"physics": {"operator": operator, "sigma_y": 0.05}}
    sampler = PosteriorSampler(tiny_network(prior), SamplerConfig(num_steps=2, sigma_y=0.05, info=info))
    sampler.save_pretrained(folder / "export")
    return str(folder / "export")


@pytest.fixture
def picture(tmp_path) -> Path:
    x0 = torch.rand(3, 2 * SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    write_image(x0, tmp_path / "picture.png")
    return tmp_path / "picture.png"


def sample(*overrides: str) -> None:
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        TASKS["sample"](compose("sample", ["lpips=null", *overrides]))  # the pictures here are too small for it


def refusal(capsys, *overrides: str) -> str:
    """Return the one line that a refused call prints."""
    with pytest.raises(SystemExit) as stopped:
        sample(*overrides)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_clean_file_is_degraded_sampled_and_scored(model, picture, tmp_path):
    out = tmp_path / "out"
    sample(f"model={model}", f"input={picture}", f"output={out}", "num_samples=3")
    (row,) = json.loads((out / "metrics.json").read_text())
    assert row["nfe"] == 6
    x0 = read_image(picture)
    samples = torch.stack([read_image(out / "samples" / f"{k:03d}.png") for k in range(3)])
    assert samples.shape == (3, *x0.shape)
    # the scores are those of the pictures, up to their 8 bits
    errors = (samples - x0).square().flatten(1).mean(1)
    assert row["psnr"] == pytest.approx((-10 * errors.log10()).mean().item(), abs=0.02)
    mean_error = (samples.mean(0) - x0).square().mean()
    assert row["psnr_mean"] == pytest.approx((-10 * mean_error.log10()).item(), abs=0.05)
    assert torch.allclose(read_image(out / "mean.png"), samples.mean(0), atol=2 / 255)
    std = samples.std(0)
    assert torch.allclose(read_image(out / "std.png"), std / std.max(), atol=0.05)
    assert read_image(out / "observation.png").shape == (3, SIZE, SIZE // 2)
    assert "picture" in (out / "report.html").read_text()


def test_same_seed_gives_the_same_pictures_and_another_seed_others(model, picture, tmp_path):
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        sample(f"model={model}", f"input={picture}", f"output={tmp_path / name}", "num_samples=1", f"seed={seed}")
    pictures = {name: (tmp_path / name / "samples" / "000.png").read_bytes() for name in "abc"}
    assert pictures["a"] == pictures["b"] != pictures["c"]


def test_degraded_file_is_taken_as_the_observation(model, tmp_path):
    x0 = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    y = SuperResolution(2).draw(1, (3, SIZE, SIZE)).A(x0)
    write_image(y[0].clamp(0, 1), tmp_path / "y.png")
    sample(f"model={model}", f"input={tmp_path / 'y.png'}", "degraded=true", f"output={tmp_path / 'out'}", "show=0")
    (row,) = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(row) == {"method", "nfe", "residual", "residual_p", "sigma_y"}  # no reference, no scores against it
    assert read_image(tmp_path / "out" / "samples" / "000.png").shape == (3, SIZE, SIZE)
    assert read_image(tmp_path / "out" / "observation.png").equal(read_image(tmp_path / "y.png"))


def test_mask_file_explains_a_degraded_picture(model, picture, tmp_path, capsys):
    mask = torch.rand(2 * SIZE, SIZE, generator=torch.Generator().manual_seed(3)) < 0.5
    Image.fromarray((255 * mask.numpy()).astype("uint8")).save(tmp_path / "mask.png")
    y = PixelMask(mask[None, None], (3, 2 * SIZE, SIZE)).A(read_image(picture)[None])
    write_image(y[0], tmp_path / "y.png")
    common = (f"model={model}", f"input={tmp_path / 'y.png'}", "degraded=true", f"output={tmp_path / 'out'}")
    assert "physics=mask" in refusal(capsys, *common, "physics=inpainting")
    sample(*common, "physics=mask", f"physics.mask={tmp_path / 'mask.png'}", "sigma_y=0.001")
    (row,) = json.loads((tmp_path / "out" / "metrics.json").read_text())
    shown = read_image(tmp_path / "out" / "samples" / "000.png")
    fit = ((shown - y[0]) * mask).norm() / (0.001 * (3 * mask.sum()) ** 0.5)
    assert row["residual"] == pytest.approx(fit.item(), rel=0.5)  # 8 samples there, one of 8 bits here


def test_folder_input_gives_a_folder_per_picture(model, picture, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.png").write_bytes(picture.read_bytes())
    sample(f"model={model}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "num_samples=2")
    for name in ("a", "b"):
        assert (tmp_path / "out" / name / "samples" / "001.png").is_file()


def test_comparison_has_all_rows_on_test_images(model, tmp_path):
    out = tmp_path / "out"
    limits = ("data.tile_size=16", "data.val_limit=1", "data.test_limit=3", "tune_samples=1")
    limits += ("methods.latino.tune={setting.tau_first:[0.2],setting.tau_last:[0.01],setting.width:[1.0,1.4]}",)
    sample(f"model={model}", "compare=true", *limits, "num_samples=2", "show=1", "crop=32", f"output={out}")
    rows = json.loads((out / "metrics.json").read_text())
    names = [row["method"] for row in rows]
    assert names[0] == "A^dagger y"
    assert names[-1] == "UD2M (K=3, N=2)"
    assert sum(name.startswith("LATINO") for name in names) == 1  # too small for LPIPS
    assert all(row["psnr"] > 0 and row["residual"] > 0 and row["seconds_per_image"] >= 0 for row in rows)
    assert (out / "chelsea-r0-c0-32" / "mean.png").is_file()
    page = Page((out / "report.html").read_text())
    assert "operator SuperResolution(factor=2), sigma_y = 0.05" in page.text
    (shown,) = [folder.name for folder in out.iterdir() if folder.is_dir() and not folder.name.endswith("-32")]
    labels = {attributes["alt"] for attributes, _ in page.images()}
    for picture, side in ((shown, 16), ("chelsea-r0-c0-32", 32)):
        assert {f"{picture}: {name}" for name in names[:-1]} <= labels
        _, array = page.picture(f"{picture}: A^dagger y")
        inverted = torch.from_numpy(array / 255).permute(2, 0, 1)[None].float()
        assert inverted.shape[-2:] == (side, side)
        physics = SuperResolution(2).draw(1, tuple(inverted.shape[1:]))
        # A A^dagger y = y, up to 8 bits and what is clamped
        assert (physics.A(inverted) - read_image(out / picture / "observation.png")).abs().mean() < 0.005
    assert not list(out.glob(".rows"))


@pytest.mark.parametrize("degraded", [False, True])
def test_comparison_shows_rivals_beside_samples_of_own_files(model, tmp_path, degraded):
    picture = tmp_path / "picture.png"
    write_image(0.4 + 0.2 * torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), picture)
    options = [f"model={model}", "compare=true", f"input={picture}", f"degraded={degraded}", "num_samples=2"]
    sample(*options, f"output={tmp_path / 'out'}")
    rows = {row["method"]: row for row in json.loads((tmp_path / "out" / "metrics.json").read_text())}
    assert list(rows) == ["A^dagger y", "warm start", "LATINO", "UD2M (K=3, N=2)"]
    assert [row["nfe"] for row in rows.values()] == [0, 0, 8, 6]
    page = Page((tmp_path / "out" / "report.html").read_text())
    for name in list(rows)[:-1]:
        assert f"picture: {name}" in {attributes["alt"] for attributes, _ in page.images()}
    _, array = page.picture("picture: A^dagger y")
    shown = torch.from_numpy(array / 255).permute(2, 0, 1).float()
    y = read_image(tmp_path / "out" / "observation.png")
    physics = SuperResolution(2).draw(1, tuple(shown.shape))
    assert (physics.A(shown[None]) - y).abs().mean() < 0.005  # A A^dagger y = y, up to 8 bits
    if not degraded:
        error = (shown - read_image(picture)).square().mean()
        assert rows["A^dagger y"]["psnr"] == pytest.approx(-10 * error.log10().item(), abs=0.05)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sigma_y=0"], "sigma_y"),
        (["sigma_y=-0.1"], "sigma_y"),
        (["num_steps=0"], "num_steps"),
        (["num_samples=0"], "num_samples"),
        (["eta=2"], "eta"),
        (["chunk_size=0"], "chunk_size"),
        (["physics=gaussian_blur", "physics.operator.width=-1"], "width"),
        (
            ["+physics.operator.factr=3"],
            "error: physics.operator: unknown argument of SuperResolution 'factr' (did you mean",
        ),
        (["+physics.operator.factor=0"], "error: factor must be an integer of at least 2, got 0"),
        (["physics=super_resolution", "physics.operator.factor=5"], "5"),
        (["physics=mask", "physics.mask=nowhere.png"], "nowhere.png"),
        (["physics=kernel"], "physics.kernel=..."),
        (["physics=deepinv"], "physics.class=..."),
        (["step_scale=0"], "step_scale"),
    ],
)
def test_bad_numbers_are_refused_and_leave_nothing(model, picture, tmp_path, capsys, overrides, expected):
    line = refusal(capsys, f"model={model}", f"input={picture}", f"output={tmp_path / 'out'}", *overrides)
    assert line.startswith("error: ")
    assert expected in line
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_bad_files_are_refused(model, picture, tmp_path, capsys):
    out = f"output={tmp_path / 'out'}"
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:200])
    write_image(torch.rand(3, 7, 9), tmp_path / "odd.png")
    for file, expected in {"missing.png": "missing.png", "text.png": "text.png", "cut.png": "cut.png"}.items():
        assert expected in refusal(capsys, f"model={model}", f"input={tmp_path / file}", out)
    assert "odd.png" in refusal(capsys, f"model={model}", f"input={tmp_path / 'odd.png'}", out)
    assert "no model" in refusal(capsys, "model=nowhere/at-all", f"input={picture}", out)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert "overwrite" in refusal(capsys, f"model={model}", f"input={picture}", out)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_an_export_cannot_name_a_class_outside_the_package(model, picture, tmp_path, capsys):
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for file in Path(model).iterdir():
        (hostile / file.name).write_bytes(file.read_bytes())
    content = json.loads((hostile / "config.json").read_text())
    content["sampler"]["info"]["physics"]["operator"] = {"class": "os.system", "command": f"touch {tmp_path}/hacked"}
    (hostile / "config.json").write_text(json.dumps(content))
    assert "physics=" in refusal(capsys, f"model={hostile}", f"input={picture}", f"output={tmp_path / 'out'}")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.slow
def test_misspelt_key_and_unknown_physics_are_refused_by_the_command(tmp_path):
    for override, expected in {"sigma=0.1": "sigma", "physics=blur": "gaussian_blur"}.items():
        result = subprocess.run(
            [sys.executable, str(REPOSITORY / "sample.py"), override],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert result.returncode != 0
        assert expected in result.stderr
        assert "Traceback" not in result.stderr


def test_an_export_names_the_parts_of_its_operator():
    """What training writes down is what sampling makes again, whatever the nesting."""
    config = OmegaConf.create({"physics": OmegaConf.load(REPOSITORY / "conf" / "physics" / "general.yaml")}).physics
    made, again = instantiate(config.operator, _convert_="all"), trained_operator(describe(config.operator))
    shape, streams = (3, 32, 32), [[torch.Generator().manual_seed(i) for i in range(12)] for _ in range(2)]
    x = torch.rand(12, *shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.draw(12, shape, streams[0]).A(x), again.draw(12, shape, streams[1]).A(x))
    stranger = describe(config.operator) | {"families": [{"class": "os.system", "command": "true"}]}
    with pytest.raises(ValueError, match=r"the model names cannot be made .*os\.system"):
        trained_operator(stranger)


def test_an_operator_that_differs_between_samples(model, tmp_path):
    x0 = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    write_image(x0, tmp_path / "picture.png")
    sample(f"model={model}", f"input={tmp_path}", "physics=general", "num_samples=3", f"output={tmp_path / 'out'}")
    row = json.loads((tmp_path / "out" / "metrics.json").read_text())[0]
    assert 0 < row["residual"] < 10


def test_a_grey_photograph_gets_colours(model, tmp_path):
    grey = torch.rand(1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    write_image(grey, tmp_path / "grey.png")
    sample(
        f"model={model}",
        f"input={tmp_path / 'grey.png'}",
        "degraded=true",
        "physics=colorization",
        "num_samples=1",
        f"output={tmp_path / 'out'}",
    )
    colour = read_image(tmp_path / "out" / "mean.png")
    assert colour.shape == (3, SIZE, SIZE)
    luminance = (torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1) * colour).sum(0)
    assert (luminance - grey[0]).abs().mean() < 0.1


# --- the noise level of one's own observation -----------------------------------------------------------------


@pytest.mark.slow
def test_the_noise_level_is_estimated_when_asked(model, tmp_path):
    scene = torch.nn.functional.interpolate(
        torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)), 4 * SIZE
    )
    noise = torch.randn(scene.shape, generator=torch.Generator().manual_seed(1))
    write_image((0.6 * scene + 0.2 + 0.03 * noise)[0], tmp_path / "y.png")
    sample(
        f"model={model}", f"input={tmp_path / 'y.png'}", "degraded=true", "sigma_y=auto", f"output={tmp_path / 'out'}"
    )
    row = json.loads((tmp_path / "out" / "metrics.json").read_text())[0]
    assert row["sigma_y"] == pytest.approx(0.03, rel=0.25)
    assert "sigma_y estimated" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("overrides", [[], ["degraded=true"], ["input=picture.png"]])
def test_only_an_own_observation_has_a_noise_level_to_estimate(capsys, model, overrides):
    assert "input=... degraded=true" in refusal(capsys, f"model={model}", "sigma_y=auto", *overrides)


def test_another_word_for_the_noise_level(capsys, model, picture):
    message = refusal(capsys, f"model={model}", f"input={picture}", "degraded=true", "sigma_y=automatic")
    assert "or auto or null, got 'automatic'" in message


@pytest.mark.parametrize(("sigma_y", "hint"), [("1e-4", "sigma_y is too small"), ("5.0", "sigma_y may be too large")])
def test_a_residual_far_from_one_is_explained(capsys, model, picture, tmp_path, sigma_y, hint):
    sample(f"model={model}", f"input={picture}", "degraded=true", f"sigma_y={sigma_y}", f"output={tmp_path / 'out'}")
    assert hint in capsys.readouterr().out
    assert hint in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("value", "silent"),
    [(0.84, False), (0.86, True), (1.0, True), (1.19, True), (1.21, False), (float("nan"), False)],
)
def test_residuals_near_one_are_left_alone(value, silent):
    physics = SuperResolution(2).draw(1, (3, SIZE, SIZE))
    assert (misfit(physics, value) == "") == silent


def test_results_have_the_depth_and_the_colour_profile_of_the_file(model, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    x0 = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    write_image(x0, tmp_path / "deep.png", PixelFormat(16, profile))
    sample(f"model={model}", f"input={tmp_path / 'deep.png'}", f"output={tmp_path / 'out'}", "num_samples=2")
    for name in ("mean.png", "observation.png", "samples/000.png"):
        assert pixel_format(tmp_path / "out" / name) == PixelFormat(16, profile)


def test_a_clean_picture_is_cut_to_what_the_operator_takes(model, tmp_path, capsys):
    x0 = torch.rand(3, SIZE + 1, SIZE + 3, generator=torch.Generator().manual_seed(0))
    write_image(x0, tmp_path / "odd.png")
    sample(f"model={model}", f"input={tmp_path / 'odd.png'}", f"output={tmp_path / 'out'}", "num_samples=2")
    assert read_image(tmp_path / "out" / "mean.png").shape == (3, SIZE, SIZE + 2)
    assert f"cut to {SIZE}x{SIZE + 2}, what the operator can take" in "".join(capsys.readouterr())


def test_a_jpeg_file_is_restored_from_its_own_coefficients(model, tmp_path):
    jpeglib = pytest.importorskip("jpeglib", reason="needs jpeglib: pip install jpeglib")
    pixels = (torch.rand(32, 48, 3, generator=torch.Generator().manual_seed(0)) * 60 + 100).byte().numpy()
    path = tmp_path / "photo.jpg"
    Image.fromarray(pixels).save(path, quality=80, subsampling=2)
    operator = ["physics=jpeg", "physics.operator.likelihood=cell"]
    arguments = [f"model={model}", *operator, "degraded=true", f"input={path}", "num_samples=2"]
    sample(*arguments, f"output={tmp_path / 'out'}")
    (row,) = json.loads((tmp_path / "out" / "metrics.json").read_text())
    restored = Image.open(tmp_path / "out" / "samples" / "000.png")
    assert restored.size == (48, 32)
    restored.save(tmp_path / "again.jpg", quality=80, subsampling=2)
    first, again = (jpeglib.read_dct(str(p)) for p in (path, tmp_path / "again.jpg"))
    changed = sum((getattr(first, c) != getattr(again, c)).sum() for c in ("Y", "Cb", "Cr"))
    count = sum(getattr(first, c).size for c in ("Y", "Cb", "Cr"))
    # Oracle: the real encoder. The row is the mean over two samples; this untrained network leaves [0, 1], and clipping
    # takes its samples out of the cell.
    assert changed / count == pytest.approx(row["residual"], rel=0.1)
