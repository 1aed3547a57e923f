"""Folders as people have them: links, folders called x.png, hidden files, pipes."""

import importlib
import os
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image
from tiny_training import command_line, tiny_overrides

from ud2m.data.folder import FolderData, files_of, find_images
from ud2m.images import list_images
from ud2m.listing import list_files

sys.path.insert(0, str(REPOSITORY / "data_prep"))
make_shards = importlib.import_module("make_shards")
PASSED = {
    "hidden": 4,
    "broken links, pipes or devices": 3,
    "with other endings": 2,
    "links to folders that were entered already": 2,
}


def save(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """17 images: 7 at the top, 2 in a folder called x.png, 4 and 1 in linked folders, 3 by links to files."""
    top = tmp_path / "top"
    for number in range(7):
        save(top / f"{number}.png", number)
    save(top / "x.png" / "a.png", 10)
    save(top / "x.png" / "B.JPG", 11)
    for number in range(4):
        save(tmp_path / "elsewhere" / f"{number}.png", 20 + number)
    save(tmp_path / "deeper" / "c.png", 30)
    (tmp_path / "elsewhere" / "more").symlink_to(tmp_path / "deeper")
    (top / "linked").symlink_to(tmp_path / "elsewhere")
    for number in range(3):
        (top / f"link-{number}.png").symlink_to(tmp_path / "elsewhere" / f"{number}.png")
    (tmp_path / "deeper" / "round").symlink_to(top)
    (top / "a-second-name").symlink_to(top / "x.png")
    save(top / ".hidden" / "a.png")
    save(top / ".hidden.png")
    (top / "._0.png").write_bytes(b"of a Mac")
    (top / ".DS_Store").touch()
    (top / "gone.png").symlink_to(top / "nothing.png")
    (top / "circle.png").symlink_to(top / "circle.png")
    os.mkfifo(top / "pipe.png")
    (top / "notes.txt").touch()
    (top / "clip.mp4").touch()
    return top


NAMES = sorted(
    [f"{n}.png" for n in range(7)]
    + ["x.png/a.png", "x.png/B.JPG", "linked/more/c.png"]
    + [f"linked/{n}.png" for n in range(4)]
    + [f"link-{n}.png" for n in range(3)]
)


def test_all_images_are_found_and_the_rest_is_counted(folder):
    found = find_images(folder)
    assert found.names == NAMES
    assert dict(found.passed) == PASSED
    assert str(found) == (
        f"17 images in {folder}, passed over: 3 broken links, pipes or devices, 4 hidden, "
        "2 links to folders that were entered already, 2 with other endings"
    )


def test_folders_and_shards_see_the_same(folder, capsys):
    assert sorted(name for split in ("train", "val", "test") for name in files_of(folder, split)) == NAMES
    assert [entry.name for entry in make_shards.list_source(folder)] == NAMES
    assert "passed over 3 broken links, pipes or devices, 4 hidden" in capsys.readouterr().out
    tops = [path.name for path in list_images(folder)]
    assert tops == sorted(name for name in NAMES if "/" not in name)
    assert list_files(folder, (".png",), below=False).passed["folders"] == 3  # x.png and the two links


def test_a_link_moves_no_file_between_splits(tmp_path):
    for number in range(30):
        save(tmp_path / "zebras" / f"{number}.png", number)
    before = {split: files_of(tmp_path, split) for split in ("train", "val", "test")}
    (tmp_path / "animals").symlink_to(tmp_path / "zebras")
    (tmp_path / "zebras" / "all").symlink_to(tmp_path)
    assert {split: files_of(tmp_path, split) for split in ("train", "val", "test")} == before


def test_splits_may_be_links(tmp_path):
    for split in ("train", "val", "test"):
        save(tmp_path / "store" / f"{split}-images" / "a.png")
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / split).symlink_to(tmp_path / "store" / f"{split}-images")
    for split in ("train", "val", "test"):
        assert files_of(tmp_path / "data", split) == [f"{split}/a.png"]


def test_data_sets_say_once_what_they_found(folder, capsys):
    data = FolderData(folder, channels=3, crop_size=16, batch_size=1, samples_per_epoch=1, tile_size=16)
    data.train_set()
    assert len({len(data.all_images(split).names) for split in ("val", "test")}) >= 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"17 images in {folder}, passed over: ")


def test_only_passed_over_is_said_where_nothing_is_left(tmp_path):
    (tmp_path / "a.PNG").mkdir()
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.tif").touch()
    with pytest.raises(ValueError, match=r"no image below .*passed over: 1 broken links, pipes or devices, 1 with oth"):
        find_images(tmp_path)
    with pytest.raises(ValueError, match=r"no image in the folder .*passed over: .* 1 folders"):
        list_images(tmp_path)


@pytest.mark.slow
def test_a_training_reads_a_folder_with_a_pipe_in_it(folder, tmp_path, capsys):
    words = [word for word in tiny_overrides("photos_prior", tmp_path) if not word.startswith("data")]
    options = [
        f"data.root={folder}",
        "data.crop_size=16",
        "data.tile_size=16",
        "data.batch_size=2",
        "data.num_workers=0",
    ]
    assert command_line(*words, "data=folder", *options, f"run_dir={tmp_path / 'run'}") == 0
    assert "17 images in" in capsys.readouterr().out
