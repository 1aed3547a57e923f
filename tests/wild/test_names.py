"""Names that become paths: results never leave the output folder, and only what was meant is replaced."""

import importlib
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir
from tiny import SIZE, adapted, save_tiny_prior, tiny_network
from tiny_training import command_line, write_images

import ud2m.priors.shipped
from ud2m.cli import sample
from ud2m.cli.commands import TASKS
from ud2m.files import inside, plain_name
from ud2m.images import write_image
from ud2m.priors.prior import Prior
from ud2m.priors.shipped import shipped_folder
from ud2m.samplers.export import read_export
from ud2m.samplers.ud2m import PosteriorSampler, SamplerConfig

sys.path.insert(0, str(REPOSITORY / "data_prep"))
make_shards, ship_model = importlib.import_module("make_shards"), importlib.import_module("ship_model")

OUTSIDE = ["..", "../x", "../../x", "a/../../x", "/abs/x", "/", "", ".", "a/./b", "a//b", "./x", "x/", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_what_would_leave_the_folder_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"an image is a relative path without '\.\.', got") as error:
        inside(tmp_path, name, "an image")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="a model has a plain name"):
        plain_name(name, "a model")


@pytest.mark.parametrize("name", ["x", "sub/x.png-r0-c1", "...", "..x", "été 1=(2), x", "a\udcffb", "a\\b", "-x"])
def test_other_names_stay_as_they_are(name, tmp_path):
    path = inside(tmp_path, name, "an image")
    assert path == tmp_path / name
    assert path.resolve().is_relative_to(tmp_path.resolve())


@pytest.mark.parametrize("name", ["", "..", ".", "../pretrained/photos_prior", "/", "photos_prior/", None])
def test_shipped_models_have_names(name):
    assert shipped_folder(name) is None
    assert shipped_folder("photos_prior") is not None


# --- the commands -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    prior = adapted(Prior.from_pretrained(save_tiny_prior(folder / "prior")))
    info = {"physics": {"operator": {"class": "ud2m.physics.GaussianBlur", "width": 1.0}, "sigma_y": 0.05}}
    PosteriorSampler(tiny_network(prior), SamplerConfig(num_steps=1, info=info)).save_pretrained(folder / "export")
    return str(folder / "export")


def sampled(*overrides: str) -> None:
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        TASKS["sample"](compose("sample", ["lpips=null", "num_samples=2", *overrides]))


def only_line(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1, lines
    return lines[0]


def renamed(path: Path, name: str) -> None:
    """Give the first image of a tar another name."""
    with tarfile.open(path) as tar:
        files = [(member, tar.extractfile(member).read()) for member in tar]
    files[0][0].name = name
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in files:
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("name", ["../../../x.png", "/tmp/ud2m-stranger/x.png", "a/x.png", ".png", "..png", "a b.png"])
def test_images_in_shards_have_plain_names(name, model, tmp_path, capsys):
    write_images(tmp_path / "images", 2, SIZE)
    shards, out = tmp_path / "shards", tmp_path / "here" / "is" / "out"
    make_shards.make_shards(tmp_path / "images", shards, make_shards.Settings(SIZE), workers=1)
    (path,) = shards.glob("*.tar")
    renamed(path, name)
    content = json.loads((shards / "index.json").read_text())
    content["shards"][0] |= {"bytes": path.stat().st_size, "sha256": make_shards.file_sha256(path)}
    (shards / "index.json").write_text(json.dumps(content))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    places = [f"data.root={shards}", f"data.held_out={shards}", f"data.crop_size={SIZE}", f"output={out}"]
    with pytest.raises(SystemExit):
        sampled(f"model={model}", "data=webdataset", *places)
    line = only_line(capsys)
    assert str(path) in line
    assert "an image in a shard has a plain name" in line
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not Path("/tmp/ud2m-stranger").exists()


def test_results_of_subfolders_lie_in_subfolders(model, tmp_path):
    """And a name of dots alone, which is no hidden file's, leads nowhere else."""
    for split in ("train", "val", "test/sub"):
        write_images(tmp_path / "data" / split, 2, SIZE)
    out = tmp_path / "out"
    places = [f"data.root={tmp_path / 'data'}", f"data.crop_size={SIZE}", f"output={out}"]
    sampled(f"model={model}", "data=folder", *places)
    assert (out / "test" / "sub" / "0.png-r0-c0" / "mean.png").is_file()


def test_names_are_looked_at_before_the_first_image_is_sampled(model, tmp_path, monkeypatch, capsys):
    pictures = write_images(tmp_path / "pictures", 2, SIZE)
    monkeypatch.setattr(sample, "list_images", lambda place: [pictures / "0.png", pictures / "...png"])
    write_image(torch.rand(3, SIZE, SIZE), pictures / "...png")
    monkeypatch.setattr(sample.SamplingRun, "sample", lambda *arguments: pytest.fail("sampled"))
    with pytest.raises(SystemExit):
        sampled(f"model={model}", f"input={pictures}", f"output={tmp_path / 'out'}")
    assert "the name of an image is a relative path without '..', got '..'" in only_line(capsys)


@pytest.mark.parametrize("name", ["../..", "/tmp/ud2m-stranger", "a/../../b"])
def test_an_evaluation_stays_in_its_folder(name, tmp_path, capsys):
    with pytest.raises(SystemExit), initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        TASKS["evaluate"](compose("evaluate", [f"name={name}", f"results={tmp_path / 'results'}"]))
    assert "the name of an evaluation is a relative path without '..'" in only_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../last.ckpt", "/etc/hostname", "'..'"])
def test_a_checkpoint_to_export_has_a_name(name, tmp_path, capsys):
    assert command_line(f"run_dir={tmp_path / 'run'}", f"export={name}") == 1
    assert "a checkpoint to export has a plain name" in only_line(capsys)


@pytest.mark.parametrize("name", ["../../x", "..", "a/../../b", "me/model/../../x"])
def test_repositories_of_the_hub_have_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for read in (read_export, Prior.from_pretrained):
        with pytest.raises((ValueError, FileNotFoundError)):
            read(name + "/nowhere")


# --- shipping -----------------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    folder = tmp_path / "pretrained"
    monkeypatch.setattr(ud2m.priors.shipped, "SHIPPED", folder)
    save_tiny_prior(folder / "one")
    save_tiny_prior(folder / "two", seed=1)
    save_tiny_prior(tmp_path / "new", seed=2)
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["", ".", "..", "/", "one/", "../pretrained", "../../x", ".one", "one\n", "a/b"])
def test_nothing_is_removed_for_a_name_that_is_none(name, shipped, tmp_path):
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="a shipped model has a plain name"):
        ship_model.ship(tmp_path / "new", name, "one", replace=True)
    assert contents(tmp_path) == before


def test_what_is_replaced_comes_back_when_that_fails(shipped, tmp_path, monkeypatch):
    before, rename = contents(tmp_path), Path.rename

    def failing(self, target):
        if self.name.endswith(".incomplete"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="No space"):
        ship_model.ship(tmp_path / "new", "one", "", replace=True)
    assert contents(tmp_path) == before
    monkeypatch.undo()


def test_what_is_replaced_is_gone_when_all_is_well(shipped, tmp_path):
    two = contents(shipped / "two")
    ship_model.ship(tmp_path / "new", "one", "", replace=True)
    assert Prior.from_pretrained(shipped / "one").fingerprint == Prior.from_pretrained(tmp_path / "new").fingerprint
    assert contents(shipped / "two") == two
    assert {path.name for path in shipped.iterdir()} == {"one", "two"}
