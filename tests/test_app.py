"""The functions behind the page of ``ud2m app``: the same pictures, numbers and refusals as ``ud2m sample``."""

import json
import re
import socket
import weakref
import zipfile

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from tiny import SIZE
from tiny_sampler import export

from ud2m import raster
from ud2m.cli import app, pages, visit
from ud2m.cli.commands import TASKS
from ud2m.cli.errors import message
from ud2m.cli.visit import MASK, OPERATORS, Request, drawn_mask, outcome, shown_levels, spread, without_places
from ud2m.files import MARKER
from ud2m.images import read_image, std_scale, write_image

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return export(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _pages():
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        yield


@pytest.fixture
def picture(tmp_path):
    folder = tmp_path / "uploads"
    folder.mkdir()
    write_image(torch.rand(3, SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(0)), folder / "a (1)=b.png")
    return folder / "a (1)=b.png"


def made(request, folder):
    told = []
    return outcome(request, CPU, folder, lambda *counts: told.append(counts)), told


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if operator.key])
def test_the_page_asks_for_what_is_in_conf(name):
    operator = OPERATORS[name]
    page = compose("sample", [f"physics={operator.page}"]).physics
    if operator.default is None:
        assert OmegaConf.is_missing(page, operator.key)  # a file must be given
    else:
        assert OmegaConf.select(page, operator.key) == operator.default


@pytest.mark.slow
def test_pictures_and_files_are_those_of_the_command(model, picture, tmp_path):
    request = Request(model, picture, operator="Gaussian blur", setting=1.2, sigma_y=0.03, num_samples=3, seed=5)
    words = [f"model={model}", f"input='{picture}'", "num_samples=3", "seed=5", "physics=gaussian_blur", "lpips=null"]
    more = ["physics.operator.width=1.2", "sigma_y=0.03", f"output={tmp_path / 'command'}"]
    TASKS["sample"](compose("sample", [*words, *more]))
    found, told = made(request, tmp_path)
    assert told[-1] == (18, 18)  # 3 samples in 3 modules and 2 steps
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    with zipfile.ZipFile(found.archive) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    written = {path for path in (tmp_path / "command").rglob("*") if path.is_file() and path.name != MARKER}
    names = {path.relative_to(tmp_path / "command").as_posix(): path for path in written}
    assert names.keys() == files.keys()
    assert json.loads(files["config.json"])["input"] == picture.name
    for name in ("samples/000.png", "samples/002.png", "mean.png", "std.png", "observation.png", "metrics.json"):
        assert files[name] == names[name].read_bytes()
    assert str(picture.parent).encode() not in b"".join(files.values())
    assert b"a (1)=b.png" in files["report.html"]
    pictures = {caption: shown for shown, caption in found.pictures}
    for caption, name in {"y": "observation", "mean": "mean", "sample 3": "samples/002"}.items():
        expected = read_image(tmp_path / "command" / f"{name}.png")
        assert np.abs(pictures[caption] / 255 - expected.permute(1, 2, 0).numpy()).max() < 0.6 / 255
    assert "std" in pictures
    samples = torch.stack([read_image(tmp_path / "command" / "samples" / f"{k:03d}.png") for k in range(3)])
    brightest = re.search(r"brightest where it is (\S+) or more", found.text)
    assert brightest
    assert float(brightest[1]) == pytest.approx(std_scale(samples.std(0)), rel=0.15)  # of 8 bits here
    before, after = found.before_after
    assert (before == pictures["y"]).all()
    assert (after == pictures["mean"]).all()
    (row,) = json.loads(files["metrics.json"])
    assert f"**Residual** {row['residual']:.3g}" in found.text
    assert "operator GaussianBlur(width=1.2" in found.text
    assert "sigma_y = 0.03" in found.text


def test_a_drawn_mask_is_what_is_missing(model, picture, tmp_path):
    layer = np.zeros((SIZE, 2 * SIZE, 4), dtype=np.uint8)
    layer[3:7, 5:20, 3] = 255
    mask = drawn_mask({"layers": [layer, np.zeros_like(layer)]}, tmp_path / "mask.png")
    assert (np.array(Image.open(mask)) == 255 - layer[..., 3]).all()
    found, _ = made(Request(model, picture, operator=MASK, setting=mask, num_samples=1), tmp_path)
    shown = {caption: picture for picture, caption in found.pictures}
    assert set(np.unique(shown["y"][3:7, 5:20])) == {round(255 * visit.GREY)}
    clean = shown_levels(read_image(picture)).astype(int)
    known = layer[..., 3] == 0
    assert np.abs(shown["y"].astype(int) - clean)[known].mean() < 20  # noise of 0.05 is 13 levels
    assert "std" not in " ".join(shown)  # one sample has none
    for nothing in (None, {"layers": []}, {"layers": [np.zeros_like(layer)]}):
        with pytest.raises(ValueError, match="no pixel is marked as missing"):
            drawn_mask(nothing, tmp_path / "none.png")


def refusals(folder, picture):
    """Yield requests that cannot be met, by what is said of them."""
    (folder / "no picture.png").write_text("hello")
    (folder / "mask.png").write_bytes(picture.read_bytes())
    small = folder / "small.png"
    Image.new("L", (4, 4), 255).save(small)
    Image.new("RGBA", (SIZE, SIZE)).save(folder / "clear.png")
    yield "is not an image that can be read", {"picture": folder / "no picture.png"}
    yield "no such file", {"picture": folder / "gone.png"}
    yield "transparent pixels", {"picture": folder / "clear.png"}
    yield "draws another operator each time", {"degraded": True}
    yield "estimates the noise of your own observation", {"sigma_y": "auto"}
    yield "sigma_y must be a positive noise level", {"sigma_y": -0.1}
    yield "num_samples must be", {"num_samples": 0}
    yield "seed must be", {"seed": -1}
    yield "unknown model", {"model": "photos_gausian_blur"}
    yield "mask.png", {"operator": MASK, "setting": folder / "mask.png"}
    yield "the mask has 4x4 pixels", {"operator": MASK, "setting": small}
    yield "no such file", {"operator": "blur with a kernel of your own", "setting": folder / "gone.npy"}
    yield "width", {"operator": "Gaussian blur", "setting": -2.0}
    yield "quality", {"operator": "JPEG", "setting": 1000.0}


@pytest.mark.slow
def test_what_the_command_refuses_is_refused_in_its_words(model, picture, tmp_path, capsys):
    for expected, changes in refusals(picture.parent, picture):
        request = Request(**({"model": model, "picture": picture} | changes))
        config = compose("sample", [quoted(word) for word in request.words()] + [f"output={tmp_path / 'out'}"])
        with pytest.raises(SystemExit):
            TASKS["sample"](config)
        told = capsys.readouterr().err.strip().splitlines()[-1]
        with pytest.raises((ValueError, OSError)) as refused:
            made(request, tmp_path)
        said = without_places(message(refused.value), request.picture, request.setting)
        assert expected in said
        assert str(picture.parent) not in said
        assert told == f"error: {message(refused.value)}"
    assert list(tmp_path.glob("*.zip")) == []


def quoted(word):
    key, _, value = word.partition("=")
    return f"{key}='{value}'" if key in ("input", "model") or value.startswith("/") else word


def test_pictures_and_samples_are_bounded(model, picture, tmp_path, monkeypatch):
    assert app.MOST_PIXELS < raster.DEFAULT_LIMIT
    assert app.BYTES_PER_PIXEL == raster.BYTES_PER_PIXEL
    monkeypatch.setenv(raster.LIMIT, str(2 * SIZE * SIZE - 1))
    with pytest.raises(ValueError, match=rf"too many pixels: {2 * SIZE}x{SIZE}, at most"):
        made(Request(model, picture), tmp_path)
    monkeypatch.setenv(raster.LIMIT, str(4 * 2 * SIZE * SIZE - 1))
    request = Request(model, picture, degraded=True, operator="super-resolution", setting=2)
    with pytest.raises(ValueError, match=rf"samples of {4 * SIZE}x{2 * SIZE} are too large"):
        made(request, tmp_path)


@pytest.mark.slow
def test_nothing_of_a_visit_stays(model, picture, tmp_path, monkeypatch):
    alive = []
    init = visit.Visit.__init__

    def noted(self, *arguments):
        init(self, *arguments)
        alive.extend(weakref.ref(part) for part in (self, self.sampler.network, self.prior))

    monkeypatch.setattr(visit.Visit, "__init__", noted)
    for seed in range(2):
        _, told = made(Request(model, picture, num_samples=1, seed=seed), tmp_path)
        assert told
    assert len(alive) == 6
    assert [part() for part in alive] == [None] * 6
    assert [path.name for path in tmp_path.iterdir() if path.name != "uploads"] == ["a (1)=b-samples.zip"]


def test_y_is_laid_over_the_samples():
    y = torch.rand(3, 2, 3)
    assert torch.equal(spread(y, (8, 12)), torch.kron(y, torch.ones(1, 4, 4)))  # super-resolution
    framed = spread(y, (6, 5))  # the border that a kernel reaches beyond
    assert torch.equal(framed[:, 2:4, 1:4], y)
    assert ((framed == visit.GREY).sum(), framed.numel()) == (3 * (30 - 6), 90)
    assert spread(torch.rand(1, 180, 40), (32, 32)) is None  # a sinogram


def test_what_the_machine_lacks_is_said_in_one_line(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = compose("app", [f"port={taken.getsockname()[1]}"])
        with pytest.raises(ValueError, match=r"port=\d+ of host=127.0.0.1 cannot be listened on \(Address already"):
            pages.check_app(config)
    pages.check_app(config)
    with pytest.raises(FileNotFoundError, match="unknown model 'photos'"):
        pages.check_app(compose("app", ["model=photos"]))
    monkeypatch.setattr(pages, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs Gradio, which is not installed: pip install 'ud2m\[app\]'"):
        pages.check_app(config)
