"""``data=folder``: splits for good, crops and tiles of the files, and clear errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from finding_crops import places_of
from PIL import Image

from ud2m.data import FolderData
from ud2m.data.folder import files_of, image_size


def folder(root, **settings):
    return FolderData(root, **{"channels": 3, "crop_size": 16, "batch_size": 2, "samples_per_epoch": 4} | settings)


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_folder_splits_every_file_once_and_for_good(tmp_path):
    for k in range(150):
        (tmp_path / f"deep/{k % 7}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"deep/{k % 7}/{k}.png").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden.png").touch()
    before = {split: set(files_of(tmp_path, split)) for split in ("train", "val", "test")}
    assert set.union(*before.values()) == {f"deep/{k % 7}/{k}.png" for k in range(150)}
    assert sum(map(len, before.values())) == 150
    assert all(4 <= len(before[split]) <= 30 for split in ("val", "test"))
    for k in range(30):
        (tmp_path / f"new{k}.png").touch()
    after = {split: set(files_of(tmp_path, split)) for split in ("train", "val", "test")}
    assert all(before[split] <= after[split] for split in before)


def test_small_folder_has_all_splits(tmp_path):
    for k in range(3):
        save(tmp_path / f"{k}.png", noise(20, 20, 3))
    assert [len(files_of(tmp_path, split)) for split in ("train", "val", "test")] == [1, 1, 1]


def test_folder_uses_subfolders_named_like_splits(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / split / "cats" / "a.png", noise(20, 20, 3))
    assert files_of(tmp_path, "train") == ["train/cats/a.png"]
    assert files_of(tmp_path, "val") == ["val/cats/a.png"]
    with pytest.raises(FileNotFoundError, match="test"):
        files_of(tmp_path, "test")


def test_folder_gives_crops_and_tiles_of_its_files(tmp_path):
    picture = noise(40, 33, 3)
    for split in ("train", "val", "test"):
        save(tmp_path / split / "a.png", picture)
    data = folder(tmp_path, scales=(1.0,), probabilities=(1.0,))
    planes = picture.transpose(2, 0, 1)
    for batch in data.train_dataloader():
        for crop in (batch * 255).round().to(torch.uint8).numpy():
            assert places_of(crop, planes) or places_of(crop[:, :, ::-1], planes)
    tiles = data.evaluation_set("test")
    assert tiles.names == [f"test/a.png-r{r}-c{c}" for r in (0, 1) for c in (0, 1)]
    assert np.array_equal((tiles[3] * 255).round().numpy(), planes[:, 16:32, 16:32])


def test_folder_converts_between_grey_and_colour(tmp_path):
    save(tmp_path / "train" / "colour.png", noise(16, 16, 3))
    save(tmp_path / "val" / "grey.png", noise(16, 16))
    grey = folder(tmp_path, channels=1).train_set()[0]
    luma = noise(16, 16, 3) @ np.array([0.299, 0.587, 0.114]) / 255
    assert min(np.abs(grey[0].numpy() - oracle).max() for oracle in (luma, luma[:, ::-1])) < 1e-6
    colour = folder(tmp_path).evaluation_set("val")[0]
    assert np.array_equal(colour.numpy(), np.stack([noise(16, 16)] * 3).astype(np.float32) / 255)


def test_folder_turns_pictures_upright(tmp_path):
    lying = np.zeros((16, 48, 3), np.uint8)
    lying[:, :16] = 255  # white on the left; orientation 6 turns left to top
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "train").mkdir()
    for name in ("a.jpg", "b.png"):
        Image.fromarray(lying).save(tmp_path / "train" / name, exif=exif)
        assert image_size(tmp_path / "train" / name) == (48, 16)
    crops = folder(tmp_path).train_set()
    for image in (0, 1):
        rows = crops.pyramid.level(image, 1.0).mean((0, 2))
        assert rows[:14].min() > 0.9
        assert rows[18:].max() < 0.1


def test_sixteen_bits_are_neither_clipped_nor_rounded(tmp_path):
    deep = (np.arange(16 * 16, dtype=np.uint16) * 257 - 100 * (np.arange(256) == 200)).reshape(16, 16).astype(np.uint16)
    save(tmp_path / "val" / "deep.png", deep)
    image = folder(tmp_path, channels=1).evaluation_set("val")[0]
    assert np.abs(image[0].numpy() - deep / 65535).max() < 1e-6


def test_folder_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder of images"):
        folder(tmp_path / "nowhere").train_set()
    with pytest.raises(NotADirectoryError, match="is a file"):
        folder(save(tmp_path / "one.png", noise(20, 20, 3))).train_set()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image below"):
        folder(tmp_path / "empty").train_set()
    with pytest.raises(ValueError, match="at least 3"):
        folder(tmp_path).train_set()

    for k, (height, width) in enumerate([(20, 20), (15, 30), (30, 8)]):
        save(tmp_path / "small" / "train" / f"{k}.png", noise(height, width, 3))
    with pytest.raises(ValueError, match=r"16x16 pixels \(2\): train/1.png \(30x15\), train/2.png \(8x30\)"):
        folder(tmp_path / "small").train_set()

    save(tmp_path / "text" / "train" / "good.png", noise(20, 20, 3))
    (tmp_path / "text" / "train" / "bad.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"bad\.png is not an image that can be read"):
        folder(tmp_path / "text").train_set()

    whole = save(tmp_path / "cut" / "train" / "cut.png", noise(64, 64, 3))
    whole.write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut\.png"):
        folder(tmp_path / "cut").train_set()[0]
