"""A broken picture among whole ones: refused at once by default, left out and listed where that is asked for."""

import pytest
import torch
from conftest import REPOSITORY
from hydra import compose, initialize_config_dir
from tiny import save_tiny_prior
from tiny_sampler import SIZE, build
from tiny_training import command_line, tiny_overrides, write_images

from ud2m.cli import sample
from ud2m.data.folder import FolderData

BROKEN = {"cut.png": lambda data: data[: len(data) // 2], "text.jpg": lambda data: b"not a picture"}


@pytest.fixture
def folder(tmp_path):
    folder = write_images(tmp_path / "images", count=6, side=SIZE)
    whole = (folder / "0.png").read_bytes()
    for name, damage in BROKEN.items():
        (folder / name).write_bytes(damage(whole))
    return folder


def sampled(folder, output, prior_folder, *words):
    build(prior_folder).save_pretrained(folder.parent / "model", overwrite=True)
    common = [f"model={folder.parent / 'model'}", f"input={folder}", f"output={output}", "num_samples=2", "lpips=null"]
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        sample.main(compose("sample", [*common, "device=cpu", *words]))


def test_sampling_refuses_them_and_names_the_file_once(folder, prior_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sampled(folder, tmp_path / "out", prior_folder, "physics=denoising")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.count("cut.png") == 1
    assert not (tmp_path / "out").exists()


def test_sampling_leaves_them_out_and_lists_them_at_the_end(folder, prior_folder, tmp_path, capsys):
    sampled(folder, tmp_path / "out", prior_folder, "physics=denoising", "skip_broken=true")
    places = {path.parent.name for path in (tmp_path / "out").glob("*/mean.png")}
    assert places == {str(k) for k in range(6)}
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("left out, since they cannot be used: 2")
    assert "cut.png" in lines[at + 1]
    assert "text.jpg" in lines[at + 2]


def test_sampling_of_broken_ones_alone_is_one_line(folder, prior_folder, tmp_path, capsys):
    for k in range(6):
        (folder / f"{k}.png").unlink()
    with pytest.raises(SystemExit):
        sampled(folder, tmp_path / "out", prior_folder, "physics=denoising", "skip_broken=true")
    assert "error: none of 2 files can be used, the first one since " in capsys.readouterr().err


def test_training_leaves_them_out_and_sees_what_it_would_see_without_them(folder, capsys):
    for split, names in {"train": ["0", "1", "2", "3"], "val": ["4"], "test": ["5"]}.items():
        (folder / split).mkdir()
        for name in names:
            (folder / f"{name}.png").rename(folder / split / f"{name}.png")
    for name in BROKEN:
        (folder / name).rename(folder / "train" / name)
    settings = {"channels": 3, "crop_size": SIZE // 2, "batch_size": 2, "samples_per_epoch": 8}
    seen = list(FolderData(folder, skip_broken=True, **settings).train_dataloader())
    told = capsys.readouterr().out
    assert all(told.count(name) == 1 for name in BROKEN)
    with pytest.raises(ValueError, match=r"cut\.png|text\.jpg"):
        list(FolderData(folder, **settings).train_dataloader())
    for name in BROKEN:
        (folder / "train" / name).unlink()
    alone = list(FolderData(folder, **settings).train_dataloader())
    assert len(seen) == len(alone) == 4
    assert all(torch.equal(one, other) for one, other in zip(seen, alone, strict=True))


@pytest.mark.slow
def test_a_run_with_broken_pictures(folder, tmp_path, capsys):
    words = tiny_overrides(save_tiny_prior(tmp_path / "prior"), folder)
    assert command_line(*words, f"run_dir={tmp_path / 'refused'}") == 1
    capsys.readouterr()
    assert command_line(*words, f"run_dir={tmp_path / 'run'}", "data.skip_broken=true") == 0
    assert capsys.readouterr().out.count("cut.png") == 1
